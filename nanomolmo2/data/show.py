"""What `inspect` and `audit` found, as terminal text and as one HTML page.

The page needs no other file and no script: images are data URIs, and its own policy forbids the
browser to load anything. All text of the data is escaped, and characters that would steer a
terminal or turn the reading direction are written as escapes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, get_args

from PIL import Image
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from nanomolmo2.data.audit import Report
from nanomolmo2.data.inspect import BranchView, Fault, Role, Token, View

_STYLES: dict[Role, Style] = {
    "image": Style(color="cyan"),
    "special": Style(dim=True),
    "prefix": Style(color="blue"),
    "user": Style(color="green"),
    "assistant": Style(color="magenta", bold=True),
}
_THUMBNAIL = 36  # characters; a character shows one pixel above another
_LOSSLESS = 256  # pixels; images up to this side are PNG in the page, larger ones JPEG


def visible(text: str) -> str:
    """Text that only shows: line ends as ↵, other characters that are not printed as escapes."""
    return "".join(
        "↵" if c == "\n" else c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in text
    )


# ---- terminal ----


def print_views(views: Iterable[View | Fault], console: Console) -> None:
    """Each example as lines of prefix, user and assistant, with token borders."""
    for view in views:
        if isinstance(view, Fault):
            message = f"record {view.record}: {visible(f'{view.cause}: {view.detail}')}"
            console.print(Text(message, style="bold red"), soft_wrap=True)
            console.print()
            continue
        console.print(Text(_headline(view), style="bold"), soft_wrap=True)
        if console.color_system is not None:
            drawn = [image for branch in view.branches for _, image in branch.drawn]
            for image in (drawn or view.images)[:1]:
                console.print(_half_blocks(image))
        for name, crop in view.crops:
            line = Text(f"  {visible(name)}: {crop.width} x {crop.height} pixels")
            console.print(line)
        rows = Table.grid(padding=(0, 1))
        rows.add_column(no_wrap=True)
        rows.add_column(overflow="fold")
        for role, tokens in _lines(view.prefix, "prefix"):
            rows.add_row(f"  {role}", _token_text(tokens))
        for number, branch in enumerate(view.branches):
            rows.add_row("", Text(_branch_line(number, branch), style="bold"))
            for role, tokens in _lines(branch.tokens, "user"):
                rows.add_row(f"  {role}", _token_text(tokens))
            for problem in branch.problems:
                rows.add_row("  problem", Text(visible(problem), style="red"))
        console.print(rows)
        console.print()


def print_report(report: Report, console: Console) -> None:
    """Findings of an audit as a table, under what was looked at."""
    console.print(Text(_summary(report)), soft_wrap=True)
    if not report.findings:
        console.print("nothing found")
        return
    table = Table("", "cause", "records", "the first", "in the first of them")
    for finding in report.findings:
        table.add_row(
            Text("fatal", style="bold red") if finding.fatal else Text("warning", style="yellow"),
            Text(visible(finding.cause)),
            str(finding.count),
            ", ".join(map(str, finding.records)),
            Text(visible(finding.detail)),
        )
    console.print(table)


def _headline(view: View) -> str:
    sizes = ", ".join(f"{width} x {height}" for width, height in view.sizes) or "none"
    learned = sum(branch.num_learned for branch in view.branches)
    return (
        f"record {view.record}: {view.num_tokens} tokens, {learned} learned; "
        f"branches: {len(view.branches)}; pictures: {sizes}"
    )


def _branch_line(number: int, branch: BranchView) -> str:
    positions = [token.position for token in branch.tokens]
    each = sorted({token.weight for token in branch.tokens if token.learned})
    weights = " to ".join(f"{weight:.4g}" for weight in (each[:1] + each[1:][-1:])) or "0"
    return (
        f"branch {number}{f' ({visible(branch.task)})' if branch.task else ''}: "
        f"subsegment {branch.subsegment}, positions {min(positions)} to {max(positions)}, "
        f"{branch.num_learned} of {len(branch.tokens)} tokens learned, weight {weights} each, "
        f"{branch.weight:.4g} in all"
    )


def _lines(tokens: Sequence[Token], first: str) -> list[tuple[str, list[Token]]]:
    """Tokens by who speaks; special ones stay with what is before them, unless they are learned."""
    lines: list[tuple[str, list[Token]]] = []
    for token in tokens:
        if token.learned:
            speaker = "assistant"
        elif token.role == "user":
            speaker = "user"
        else:
            speaker = lines[-1][0] if lines else first
            # What follows an answer opens the next question.
            speaker = "user" if speaker == "assistant" else speaker
        if not lines or lines[-1][0] != speaker:
            lines.append((speaker, []))
        lines[-1][1].append(token)
    return lines


def _written(token: Token) -> str:
    return visible(token.text) + (f" ×{token.count}" if token.count > 1 else "")


def _token_text(tokens: Iterable[Token]) -> Text:
    """Tokens with thin borders between them; learned ones are underlined."""
    text = Text()
    for number, token in enumerate(tokens):
        if number:
            text.append("│", style="dim")
        text.append(_written(token), style=_STYLES[token.role] + Style(underline=token.learned))
    return text


def _half_blocks(image: Image.Image) -> Text:
    """An image in characters: the upper half of each is one pixel, the lower the next."""
    rows = max(1, round(_THUMBNAIL * image.height / image.width / 2))
    small = image.resize((_THUMBNAIL, 2 * rows))
    text = Text(no_wrap=True)
    for y in range(0, 2 * rows, 2):
        text.append("  ")
        for x in range(_THUMBNAIL):
            upper, lower = (
                "#{:02x}{:02x}{:02x}".format(*_rgb(small.getpixel((x, y + half))))
                for half in (0, 1)
            )
            text.append("▀", style=f"{upper} on {lower}")
        text.append("\n")
    return text


def _rgb(pixel: Any) -> tuple[int, int, int]:
    red, green, blue = pixel
    return red, green, blue


# ---- page ----


def make_page(
    views: Sequence[View | Fault], source: str, model: str, report: Report | None = None
) -> str:
    """One HTML page of examples, under the findings of an audit if there was one."""
    legend = " ".join(f'<span class="t {role}">{role}</span>' for role in get_args(Role))
    body = [
        f"<h1>{_html(source)}</h1>",
        f"<p>What the model {_html(model)} sees of its examples.</p>",
        f'<p class="legend">{legend} <span class="t assistant learned">learned</span></p>',
    ]
    if report is not None:
        body.append(_report_html(report))
    body += [_view_html(view) for view in views]
    title = f"{source} as {model} sees it"
    return _PAGE.format(title=_html(title), style=_CSS, body="\n".join(body))


def _report_html(report: Report) -> str:
    rows = [
        f'<tr class="{"fatal" if finding.fatal else "warning"}">'
        f"<td>{'fatal' if finding.fatal else 'warning'}</td><td>{_html(finding.cause)}</td>"
        f"<td>{finding.count}</td><td>{', '.join(map(str, finding.records))}</td>"
        f"<td>{_html(finding.detail)}</td></tr>"
        for finding in report.findings
    ]
    heads = ("", "cause", "records", "the first", "in the first of them")
    table = _table(heads, rows) if rows else "<p>Nothing found.</p>"
    return f"<section><h2>Audit</h2><p>{_html(_summary(report))}</p>{table}</section>"


def _view_html(view: View | Fault) -> str:
    if isinstance(view, Fault):
        return (
            f"<article><h2>record {view.record}</h2>"
            f'<p class="fatal">{_html(view.cause)}: {_html(view.detail)}</p></article>'
        )
    images = [
        _figure(image, f"picture {number}, {width} x {height} pixels")
        for number, (image, (width, height)) in enumerate(
            zip(view.images, view.sizes, strict=True), start=1
        )
    ]
    crops = [_figure(crop, name) for name, crop in view.crops]
    parts = [f"<h2>{_html(_headline(view))}</h2>"]
    if images:
        parts.append(f'<div class="figures">{"".join(images)}</div>')
    if crops:
        parts.append(
            f"<details><summary>what the vision encoder gets: {len(crops)}</summary>"
            f'<div class="figures">{"".join(crops)}</div></details>'
        )
    parts.append(f"<h3>prefix</h3>{_tokens_html(view.prefix)}")
    for number, branch in enumerate(view.branches):
        drawn = [_figure(image, name) for name, image in branch.drawn]
        parts.append(f"<h3>{_html(_branch_line(number, branch))}</h3>")
        parts.append(_tokens_html(branch.tokens))
        parts += [f'<p class="fatal">{_html(problem)}</p>' for problem in branch.problems]
        if drawn:
            parts.append(f'<div class="figures">{"".join(drawn)}</div>')
    parts.append(f"<details><summary>every token</summary>{_token_table(view)}</details>")
    return f"<article>{''.join(parts)}</article>"


def _tokens_html(tokens: Iterable[Token]) -> str:
    spans = []
    for token in tokens:
        title = f"{token.index}: id {token.id}, position {token.position}"
        if token.learned:
            title += f", learned, weight {token.weight:.4g}"
        kinds = f"t {token.role}{' learned' if token.learned else ''}"
        spans.append(f'<span class="{kinds}" title="{title}">{escape(_written(token))}</span>')
    return f'<p class="tokens">{"".join(spans)}</p>'


def _token_table(view: View) -> str:
    heads = ("index", "subsegment", "position", "token", "id", "role", "learned", "weight")
    rows = []
    subsegments: list[tuple[int | str, list[Token]]] = [("prefix", view.prefix)]
    subsegments += [(branch.subsegment, branch.tokens) for branch in view.branches]
    for subsegment, tokens in subsegments:
        for token in tokens:
            cells = (
                _range(token.index, token.count),
                subsegment,
                _range(token.position, token.count),
                f'<span class="t {token.role}">{escape(_written(token))}</span>',
                token.id,
                token.role,
                "yes" if token.learned else "",
                f"{token.weight:.4g}" if token.learned else "",
            )
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return _table(heads, rows)


def _range(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first} to {first + count - 1}"


def _table(heads: Iterable[str], rows: Iterable[str]) -> str:
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _figure(image: Image.Image, caption: str) -> str:
    name = escape(caption)
    shown = f'<img src="{data_uri(image)}" alt="{name}" width="{image.width}">'
    return f"<figure>{shown}<figcaption>{name}</figcaption></figure>"


def data_uri(image: Image.Image) -> str:
    """An image as text that an ``img`` shows."""
    stream = io.BytesIO()
    if max(image.size) <= _LOSSLESS:
        kind = "png"
        image.save(stream, format="PNG")
    else:
        kind = "jpeg"
        image.save(stream, format="JPEG", quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _html(text: str) -> str:
    return escape(visible(text))


def _summary(report: Report) -> str:
    return (
        f"{visible(report.source)}: looked at {report.records} of {report.size} records, of which "
        f"{report.good} can be read: {report.branches} branches, {report.pictures} pictures, "
        f"{report.tokens:,} tokens of which {report.labels:,} are learned, the longest record "
        f"{report.longest:,} of at most {report.max_tokens:,} tokens{_beside(report)}"
    )


def _beside(report: Report) -> str:
    """What is no finding, and good to know."""
    said = ""
    if report.outside:
        first = visible(report.outside_first)
        said += f"; {report.outside} files outside the folder of the data (the first: {first})"
    if report.unread:
        listed = ", ".join(f"{visible(name)} ({n})" for name, n in sorted(report.unread.items()))
        said += f"; fields that are not read: {listed}"
    return said


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_CSS = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #ffffff; --line: #c8c8c8;
  --image: #d2f0f4; --special: #e6e6e6; --prefix: #d9e4fb; --user: #dcf2d8;
  --assistant: #fadcf0; --bad: #b00020; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececec; --paper: #161616; --line: #4a4a4a;
  --image: #12454d; --special: #3a3a3a; --prefix: #24385f; --user: #1f4a1c;
  --assistant: #5c2149; --bad: #ff8a94; } }
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif;
  max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; font-weight: 600; margin: 1rem 0 0.3rem; overflow-wrap: anywhere; }
article, section { border-top: 1px solid var(--line); margin-top: 1.5rem; }
.t { font-family: ui-monospace, monospace; font-size: 0.9em; white-space: pre-wrap;
  overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: 3px; padding: 0 1px; }
.tokens { line-height: 1.9; margin: 0; }
.image { background: var(--image); }
.special { background: var(--special); }
.prefix { background: var(--prefix); }
.user { background: var(--user); }
.assistant { background: var(--assistant); }
.learned { text-decoration: underline 2px; text-underline-offset: 3px; font-weight: 600; }
.fatal { color: var(--bad); }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; margin: 0.5rem 0; }
figure { margin: 0; }
figcaption { font-size: 0.85rem; }
img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { border: 1px solid var(--line); padding: 0.15rem 0.5rem; text-align: left; }
"""
