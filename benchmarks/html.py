"""Tables of the page."""

from html import escape


class Html(str):
    """Text that is HTML already."""


def html(value):
    return value if isinstance(value, Html) else escape(str(value))


def table(head, rows, kind=""):
    """A table in a container that scrolls; heads that begin with ">" stand over numbers."""
    number = [' class="n"' if h.startswith(">") else "" for h in head]
    lines = [
        "<tr>" + "".join(f"<th{c}>{html(h.lstrip('>'))}</th>" for h, c in zip(head, number, strict=True)) + "</tr>"
    ]
    for row in rows:
        cells = (f"<td{c}>{html(v)}</td>" for v, c in zip(row, number, strict=True))
        lines.append("<tr>" + "".join(cells) + "</tr>")
    body = "\n".join(lines[1:])
    return f'<div class="scroll {kind}"><table><thead>{lines[0]}</thead><tbody>{body}</tbody></table></div>'
