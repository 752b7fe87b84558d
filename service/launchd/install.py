"""The plans: install or upgrade, restart, uninstall; for a daemon and for an agent.

To install over another version is to upgrade: the new one is built beside the old, its interpreter checks the
configuration, the old service drains and ends, the link is moved, the new one starts and must become ready; where it
does not, all is put back and the old one starts again. One engine fits on a host, so there is a gap: the time of a
load. Blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from service.launchd import configuration, newsyslog
from service.launchd.environment import Model, Source, ask
from service.launchd.files import Built, File, Folder, Gone, Link
from service.launchd.launchctl import Accounts, Launchd
from service.launchd.layout import Account, Layout, interpreter
from service.launchd.ownership import ROOT_UID, changeable, changeable_below
from service.launchd.plan import Act, Plan, Step, StepFailed
from service.launchd.plist import Job, exit_timeout, problems
from service.settings import Settings

POLL = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a plan is made for, and with. `launchd` and `accounts` None: not asked, as in a staged installation.

    `wait_ready` returns when the service is ready and raises StepFailed when it does not become so.
    """

    layout: Layout
    settings: Settings
    launchd: Launchd | None
    accounts: Accounts | None = None
    wait_ready: Callable[[], object] = lambda: None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], object] = time.sleep

    @property
    def patience(self) -> float:
        """Seconds for the service to end."""
        return float(exit_timeout(self.settings)) + 5

    def ids(self) -> tuple[int, int] | None:
        """The account's; None when it is not there (yet), or nobody is asked."""
        account = self.layout.account
        return None if account is None or self.accounts is None else self.accounts.ids(account)


@dataclass(frozen=True, slots=True)
class Daemon:
    """What is installed. `model` None: the configuration that is there stays as it is, and its model too."""

    source: Source
    model: Model | None


def refusals(parts: Parts, daemon: Daemon) -> Iterator[str]:
    """Why a daemon must not be made of this, one sentence each."""
    layout, ids = parts.layout, parts.ids()
    owners = frozenset({ROOT_UID} | ({ids[0]} if ids else set()))
    yield from configuration.refusals(parts.settings, owners=owners, below=layout.root)
    if daemon.model is None and not layout.config.is_file():
        yield f"{layout.config}: there is none; install first"
    for path in dict.fromkeys((daemon.source.python, daemon.source.prefix)):
        if path.is_relative_to(layout.root):
            yield from (f"the interpreter {path}: {why}" for why in changeable(path, below=layout.root))


def install(parts: Parts, daemon: Daemon) -> Plan:
    """Install a daemon, or upgrade the one that is there."""
    layout, source = parts.layout, daemon.source
    version = layout.versions / source.name()
    job = Job.of(layout, parts.settings).render()
    link = Link(layout.current, lambda: version)
    plist = File(layout.plist, lambda: job)
    config = [] if daemon.model is None else [_config(parts, daemon.model)]
    settled = all(each.done() for each in (*config, link, plist))
    building: list[Step] = [
        *_accounts(parts),
        *(Folder(each) for each in (layout.base, layout.versions, layout.models, layout.config.parent)),
        *_missing(layout.newsyslog.parent, layout.plist.parent),
        Folder(layout.state, mode=0o700, owner=parts.ids),
        Folder(layout.logs, mode=0o750, owner=parts.ids),
        Built(version, source.build, what="code and libraries"),
        *([] if daemon.model is None else [Built(_model(layout, daemon.model), daemon.model.build, what="model")]),
        *config,
        Act("check the configuration with the new code", lambda: _check(layout, version), is_done=lambda: settled),
        Act("check that root alone can change what runs", lambda: _owned(parts, version), is_done=lambda: settled),
        Act("check the plist", lambda: _lint(job), is_done=lambda: settled),
    ]
    rotation = File(layout.newsyslog, lambda: newsyslog.lines(layout).encode())
    switching = _restarted(parts, [link, plist], needed=not settled)
    return Plan((*building, rotation, *switching, *_outdated(layout, version)))


def install_agent(parts: Parts, python: Path) -> Plan:
    """Install an agent of this user, over the code where it is."""
    layout = parts.layout
    job = Job.of(layout, parts.settings, agent_interpreter=python).render()
    folders = [*_missing(layout.logs, layout.plist.parent), *_missing(layout.state, mode=0o700)]
    plist = File(layout.plist, lambda: job)
    settled = plist.done()
    check = Act("check the plist", lambda: _lint(job), is_done=lambda: settled)
    return Plan((*folders, check, *_restarted(parts, [plist], needed=not settled)))


def uninstall(parts: Parts, *, purge: bool) -> Plan:
    """End the service and take away what was installed; state, keys, logs and configuration only with `purge`."""
    layout = parts.layout
    steps: list[Step] = [*_stop(parts, needed=True), Gone(layout.plist)]
    if layout.account is not None:
        steps += [Gone(layout.newsyslog), Gone(layout.current), Gone(layout.versions), Gone(layout.models)]
        steps += [Gone(each) for each in (layout.base, layout.state) if purge]
    if purge:
        steps.append(Gone(layout.logs))
    if purge and layout.account is not None and parts.accounts is not None:
        steps.append(_no_account(parts.accounts, layout.account))
    return Plan(tuple(steps))


def restart(parts: Parts) -> Plan:
    """Let the service drain and end, then start it. Raises StepFailed where launchd does not know it."""
    launchd = _known(parts)
    return Plan(
        (
            Act(f"SIGTERM: drain and end, within {parts.patience:g} s", lambda: _end(parts, launchd)),
            Act("start", launchd.start),
            Act("wait until it is ready", parts.wait_ready),
        )
    )


def _known(parts: Parts) -> Launchd:
    if parts.launchd is None or parts.launchd.look() is None:
        raise StepFailed(f"{parts.layout.target} is not installed")
    return parts.launchd


def _end(parts: Parts, launchd: Launchd) -> None:
    """By SIGTERM, which is the drain; only a process that does not end by it is killed."""
    first = launchd.look()
    if first is None or first.pid is None:
        return
    launchd.signal("TERM")
    ends = parts.clock() + parts.patience
    while (now := launchd.look()) is not None and now.pid == first.pid:
        if parts.clock() >= ends:
            launchd.start(kill=True)
            return
        parts.sleep(POLL)


def _restarted(parts: Parts, changes: list[Step], *, needed: bool) -> list[Step]:
    """`changes` while the service is down, where it is `needed`; then it is up and ready."""
    start: list[Step] = []
    if (launchd := parts.launchd) is not None:
        plist = parts.layout.plist
        start = [
            Act(
                f"load {plist} into {parts.layout.domain}: it starts now and at every boot or login",
                lambda: launchd.bootstrap(plist),
                lambda: launchd.bootout(parts.patience),
                lambda: launchd.look() is not None,
            ),
            Act("wait until it is ready", parts.wait_ready, is_done=lambda: not needed and launchd.look() is not None),
        ]
    return [*_stop(parts, needed=needed), *changes, *start]


def _stop(parts: Parts, *, needed: bool) -> list[Step]:
    if (launchd := parts.launchd) is None:
        return []
    return [
        Act(
            f"end {parts.layout.target}: drain, within {parts.patience:g} s, and unload",
            lambda: launchd.bootout(parts.patience),
            lambda: launchd.bootstrap(parts.layout.plist),
            lambda: not needed or launchd.look() is None,
        )
    ]


def _accounts(parts: Parts) -> list[Step]:
    account, accounts = parts.layout.account, parts.accounts
    if account is None or accounts is None:
        return []
    what = f"account {account.user}, group {account.group}: no shell, no password, hidden"
    return [
        Act(
            what,
            lambda: accounts.create(account),
            lambda: accounts.delete(account),
            lambda: accounts.ids(account) is not None,
        )
    ]


def _no_account(accounts: Accounts, account: Account) -> Step:
    return Act(f"remove the account {account.user}", lambda: accounts.delete(account))


def _missing(*folders: Path, mode: int = 0o755) -> list[Step]:
    """Of others' folders, those that are not there: what is there stays as it is."""
    return [Folder(each, mode=mode) for each in folders if not each.is_dir()]


def _config(parts: Parts, model: Model) -> File:
    layout, place = parts.layout, _model(parts.layout, model)
    text = configuration.render(parts.settings, layout, model=place, model_name=model.name)
    ids = parts.ids
    return File(
        layout.config, text.encode, mode=0o640, owner=lambda: (ROOT_UID, found[1]) if (found := ids()) else None
    )


def _model(layout: Layout, model: Model) -> Path:
    return layout.models / model.place()


def _check(layout: Layout, version: Path) -> None:
    ask(interpreter(version), "-m", "service", "--config", str(layout.config), "config", "show")


def _owned(parts: Parts, version: Path) -> None:
    layout = parts.layout
    if parts.ids() is None:  # staged: it belongs to whoever stages it
        return
    below = layout.root
    found = [*changeable(layout.config, below=below), *changeable(version, below=below)]
    found += [*changeable_below(version, below=below), *changeable_below(layout.models, below=below)]
    if found := list(dict.fromkeys(found)):
        raise StepFailed("\n".join(found[:10]))


def _lint(job: bytes) -> None:
    if found := problems(job):
        raise StepFailed("\n".join(found))


def _outdated(layout: Layout, version: Path) -> list[Step]:
    """Versions that are neither the new one nor the one before it."""
    kept = {version, layout.current.readlink() if layout.current.is_symlink() else version}
    there = sorted(layout.versions.iterdir()) if layout.versions.is_dir() else []
    return [Gone(each) for each in there if each not in kept and not each.name.startswith(".")]
