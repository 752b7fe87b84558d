"""The frame of a drawing."""

from collections.abc import Iterable


def svg(width: int, height: int, parts: Iterable[str]) -> str:
    """A document of these elements on white."""
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>", ""])
