"""Write constraints.txt from pip's own resolution reports; `make constraints` runs it in a clean environment.

Usage: constraints.py REPORT.json... > constraints.txt
Names and versions only: no hosts, hashes or paths, so the file holds on any machine and any index.
"""

import json
import sys
from pathlib import Path

HEADER = """\
# Every version that `make` installs, on every platform. Made by `make constraints`; do not edit.
# A line binds only where its package is wanted, so those of other platforms cost nothing.
"""


def main(reports: list[str]) -> None:
    """Print the union of the reports; two versions of one package are an error."""
    pins: dict[str, str] = {}
    for report in reports:
        for item in json.loads(Path(report).read_text("utf-8"))["install"]:
            name, version = item["metadata"]["name"].lower().replace("_", "-"), item["metadata"]["version"]
            if name == "mlxd":
                continue
            if pins.setdefault(name, version) != version:
                sys.exit(f"{name}: the reports disagree, {pins[name]} and {version}")
    pins["mlx-metal"] = pins["mlx"]  # what the base package brings on a Mac; always released together
    sys.stdout.write(HEADER + "".join(f"{name}=={pins[name]}\n" for name in sorted(pins)))


if __name__ == "__main__":
    main(sys.argv[1:])
