"""The few pieces of HTML that a page is made of. Whatever text goes in is escaped."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from radlads.report.charts import Chart
from radlads.report.wording import NOT_MEASURED, NOT_RECORDED


def section(title: str, *parts: str) -> str:
    """A heading and what stands under it."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(part for part in parts if part) + "\n</section>"


def paragraph(text: str, kind: str = "") -> str:
    """kind: lead, note or nothing."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def missing(command: str = "", *, what: str = "", how: str = NOT_MEASURED) -> str:
    """What stands where nothing was measured, with the command that would."""
    text = f"{what}: {how}" if what else how
    return f'<p class="missing">{escape(text)}' + (f"<code>{escape(command)}</code>" if command else "") + "</p>"


def heading(text: str) -> str:
    """Within a section."""
    return f"<h3>{escape(text)}</h3>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Its first column is names, the others are numbers. Scrolls by itself where it is wider than the page."""
    lines = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    columns = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "\n".join(lines)
    return f'<div class="wide"><table>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def facts(pairs: Mapping[str, str]) -> str:
    """Names and what they stand for; an empty one was not recorded."""
    items = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(text or NOT_RECORDED)}</dd>" for name, text in pairs.items())
    return f"<dl>\n{items}\n</dl>" if items else missing(how=NOT_RECORDED)


def figures(pairs: Iterable[tuple[str, str]]) -> str:
    """Large figures, each with what it is."""
    items = "\n".join(f"<div>{_figure(value)}<span>{escape(name)}</span></div>" for value, name in pairs)
    return f'<div class="figures">\n{items}\n</div>' if items else ""


def _figure(value: str) -> str:
    return f'<b class="none">{value}</b>' if value == NOT_MEASURED else f"<b>{escape(value)}</b>"


def charts(drawn: Iterable[Chart]) -> str:
    """Charts side by side, one below the other on a phone."""
    items = "\n".join(f"<figure><figcaption>{escape(each.title)}</figcaption>{each.svg()}</figure>" for each in drawn)
    return f'<div class="charts">\n{items}\n</div>' if items else ""


def with_gaps(charts: str, gaps: Iterable[str]) -> list[str]:
    """Charts and what is missing beside them; a single sentence where there are none."""
    return [charts, *(missing(what=gap) for gap in gaps)] if charts else [missing()]


def columns(*parts: str) -> str:
    """Parts side by side where there is room."""
    return '<div class="columns">\n' + "\n".join(f"<div>{part}</div>" for part in parts) + "\n</div>"


def code(text: str) -> str:
    """Text as it is, in lines that break where they must."""
    return f"<pre>{escape(text)}</pre>"


def folded(title: str, text: str) -> str:
    """Code that shows when its title is touched."""
    return f"<details><summary>{escape(title)}</summary>{code(text)}</details>"


def page(title: str, style: str, body: Sequence[str]) -> str:
    """A whole document that needs nothing but itself."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Without it browsers ask the server for one
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n"
        "</html>\n"
    )
