"""Who is asking. Until there is authentication everybody on the loopback interface is `LOCAL`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Principal:
    """An identity: `id` decides fairness and limits, `tenant` separates prefix caches."""

    id: str
    tenant: str


LOCAL = Principal(id="local", tenant="local")
