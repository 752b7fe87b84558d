"""The lines by which macOS's newsyslog rotates our logs; `man newsyslog.conf` has the columns.

No process is signalled (flag N), so there is no file with a process id: one that the service could write would let it
choose whom root signals. The service sees that its file was replaced and opens the new one, or is told with SIGHUP.
Nothing is compressed: newsyslog would read the old file while the last lines still go there.
"""

from __future__ import annotations

from service.launchd.layout import Layout

KIBIBYTES = 100_000
COUNT = 10


def lines(layout: Layout) -> str:
    """The file of a daemon's `layout`."""
    owner = "" if layout.account is None else f"{layout.account.user}:{layout.account.group}"
    head = "# logfilename owner:group mode count size(KiB) when flags\n"
    return head + "".join(
        f"{path}\t{owner}\t640\t{COUNT}\t{size}\t*\tN\n"
        for path, size in ((layout.log, KIBIBYTES), (layout.crash_log, KIBIBYTES // 10))
    )
