"""The docs site: Sphinx with MyST, furo and autodoc (`make docs`)."""

import argparse
import dataclasses
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.builders.html import StandaloneHTMLBuilder
from sphinx.domains.std import StandardDomain
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

os.environ["HF_HUB_OFFLINE"] = "1"
DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

import lotlip_hf  # noqa: E402
from lotlip_hf import cli  # noqa: E402
from lotlip_hf.options import choices  # noqa: E402

project = "lotlip-hf"
author = copyright = "The lotlip-hf authors"
version = release = lotlip_hf.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
nitpicky = True
smartquotes = False
templates_path = ["_templates"]
myst_heading_anchors = 4
suppress_warnings = ["config.cache"]

html_theme = "furo"
html_title = f"lotlip-hf {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_only_copy_prompt_lines = False

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
toc_object_entries_show_parents = "hide"
maximum_signature_line_length = 80

# Code that is not closed runs to the end.
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)(?:^\1```$|\Z)", re.MULTILINE | re.DOTALL)
# One of: a reference; code; a link; emphasis; a character that reST reads as markup.
INLINE = re.compile(
    r"(?P<before>\w?)(?:"
    r"\[`(?P<ref>~?[\w.]+)(?:\(\))?`\](?:\([^)]*\))?|(?P<ticks>``?)(?P<code>[^`]+?)(?P=ticks)|"
    r"\[(?P<text>[^\]]+)\]\((?P<url>https?://[^)\s]+)\)|(?P<keep>\*\*\w[^*\n]*\*\*|\*\w[^*\n]*\*|https?://[^\s)]+)|"
    r"(?P<special>[*|\\]|(?<=\w)_(?!\w)))(?P<after>\w?)"
)
CLASS_NAME = re.compile(r"(?:\w+\.)*[A-Z]\w*[a-z]\w*")


def inline_markup(match: re.Match[str]) -> str:
    """Converts one piece of inline Markdown to reST."""
    groups = match.groupdict()
    if groups["ref"]:
        name = groups["ref"]
        text = f":py:obj:`{name if name.startswith('~') or '.' not in name else f'{name} <{name}>'}`"
    elif groups["code"]:
        code = " ".join(groups["code"].split())
        text = f":py:obj:`{code}`" if CLASS_NAME.fullmatch(code) else f"``{code}``"
    elif groups["text"]:
        text = f"`{groups['text']} <{groups['url']}>`__"
    elif groups["keep"]:
        text = groups["keep"]
    else:
        return f"{groups['before']}\\{groups['special']}{groups['after']}"
    before, after = groups["before"] and groups["before"] + "\\ ", groups["after"] and "\\ " + groups["after"]
    return before + text + after


def prose(text: str) -> str:
    """Converts Markdown without fenced code to reST, with an empty line before and after each list."""
    lines: list[str] = []
    item = None  # indent of the list item above
    for line in INLINE.sub(inline_markup, text).split("\n"):
        indent = len(line) - len(line.lstrip())
        is_item = bool(re.match(r" *(?:-|\d+\.) ", line))
        if line.strip() and lines and lines[-1].strip():
            if is_item and item is None or item is not None and not is_item and indent <= item:
                lines.append("")
        item = indent if is_item else None if not line.strip() or item is not None and indent <= item else item
        lines.append(line)
    return "\n".join(lines)


def to_rest(text: str) -> str:
    """Converts a docstring in Markdown to reST with Google's sections."""
    pieces, end = [], 0
    for fence in FENCE.finditer(text):
        indent, language, code = fence.groups()
        code = re.sub(r"  # doctest: .*", "", code)
        kind = "pycon" if ">>> " in code else language or "text"
        code = "".join(f"    {line}" if line.strip() else line for line in code.splitlines(keepends=True))
        pieces += [prose(text[end : fence.start()]), f"\n{indent}.. code-block:: {kind}\n\n{code}\n"]
        end = fence.end()
    text = "".join([*pieces, prose(text[end:])])
    # napoleon expects bare names of exceptions
    raises = re.search(r"^ *Raises:\n(?:^ +.*\n?|^\n)*", text, re.MULTILINE)
    if raises:
        bare = re.sub(r"^( +)((?:(?::py:obj:|`)?`[\w.]+``?(?:, | or )?)+):", _bare_names, raises.group(), flags=re.M)
        text = text.replace(raises.group(), bare)
    return text


def _bare_names(match: re.Match[str]) -> str:
    return match[1] + ", ".join(re.findall(r"`([A-Za-z][\w.]*)`", match[2])) + ":"


def option_lines(config_class: type) -> Iterator[str]:
    """Returns the `Args:` of a dataclass whose fields are made by `lotlip_hf.options.option`."""
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if "help" in field.metadata:
            kind = inspect.formatannotation(hints[field.name]).removesuffix(" | None")
            kind = " or ".join(f'`"{word}"`' for word in choices(hints[field.name])) or f"`{kind}`"
            optional = "" if field.default is dataclasses.MISSING else ", *optional*"
            default = f", defaults to `{field.default!r}`" if field.default not in (dataclasses.MISSING, None) else ""
            text = field.metadata["help"]
            yield f"    {field.name} ({kind}{optional}{default}): {text[:1].upper()}{text[1:].rstrip('.')}."


def has_options(value: Any) -> bool:
    """Returns whether a value is a dataclass with such fields."""
    fields = dataclasses.fields(value) if inspect.isclass(value) and dataclasses.is_dataclass(value) else ()
    return any("help" in field.metadata for field in fields)


def process_docstring(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Converts a docstring, before napoleon reads its sections."""
    if has_options(value) and "Args:" not in lines:
        heads = [index for index, line in enumerate(lines) if re.fullmatch(r"(Raises|Examples?):", line)]
        first = heads[0] if heads else len(lines)
        lines[first:first] = ["", "Args:", *option_lines(value), ""]
    lines[:] = to_rest("\n".join(lines)).split("\n")


def process_signature(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None] | None:
    """Shortens the signatures of configurations, whose options are listed below them."""
    from transformers import PreTrainedConfig

    if has_options(value) or inspect.isclass(value) and issubclass(value, PreTrainedConfig):
        return "(**options)", returned
    return None


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.Element) -> nodes.Element | None:
    """Links a Python name to the entry whose path ends with it. A name without an entry stays code."""
    if node.get("refdomain") != "py":
        return None
    objects = env.get_domain("py").data["objects"]  # pyright: ignore
    target = node["reftarget"].lstrip("~.")
    names = [name for name in objects if name == target or name.endswith(f".{target}")]
    if not names and target.startswith("lotlip_hf."):  # the entry has the short name
        names = [name for name in objects if name == f"lotlip_hf.{target.rpartition('.')[2]}"]
    own = [name for name in names if name.startswith(f"{node.get('py:module') or ''}.")]
    chosen = names if len(names) == 1 else own
    if len(chosen) != 1:
        return text
    entry = objects[chosen[0]]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, text, chosen[0])


def typeset_dashes(app: Sphinx, doctree: nodes.document) -> None:
    """Sets the dashes between arguments and descriptions; smartquotes would set those of `--options` too."""
    for text in list(doctree.findall(nodes.Text)):
        if " -- " in text and not isinstance(text.parent, nodes.literal | nodes.literal_block):
            text.parent.replace(text, nodes.Text(text.replace(" -- ", " – ")))


def as_markdown(text: str) -> str:
    """Escapes plain text for Markdown, except for code between backticks. Options become code."""
    pieces = re.split(r"(`[^`\n]+`|(?<![\w-])--[a-z][\w-]*)", text)
    pieces[::2] = [re.sub(r"([\\*_\[\]<>#|`$])", r"\\\1", piece) for piece in pieces[::2]]
    pieces[1::2] = [f"`{piece.strip('`')}`" for piece in pieces[1::2]]
    return "".join(pieces)


def paragraphs(text: str) -> str:
    """Converts a description of a parser to Markdown: indented lines are commands or tables."""
    parts = []
    for block in re.split(r"\n{2,}", text.strip("\n")):
        is_code = any(line.startswith("  ") for line in block.split("\n"))
        parts.append(f"```text\n{textwrap.dedent(block).strip()}\n```" if is_code else as_markdown(block))
    return "\n\n".join(parts)


def command_page(name: str, parser: argparse.ArgumentParser) -> str:
    """Returns the page of a command."""
    formatter = parser._get_formatter()
    usage = parser.format_usage().strip()
    if usage.count("\n") > 8:
        positional = "".join(f" {formatter._format_args(one, one.dest)}" for one in parser._get_positional_actions())
        usage = f"usage: {parser.prog} [options]{positional}"
    parts = [f"# lotlip {name}", paragraphs(parser.description or ""), f"```text\n{usage}\n```"]
    parts.append(f"```{{program}} lotlip {name}\n```")
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        if not actions:
            continue
        title = (group.title or "Options").replace("positional arguments", "Arguments")
        parts.append(f"## {title[:1].upper()}{title[1:]}")
        if group.description:
            parts.append(paragraphs(group.description))
        for action in actions:
            help = as_markdown(" ".join(formatter._expand_help(action).split())) if action.help else ""
            words = formatter._format_action_invocation(action)
            parts.append(f"````{{option}} {words}\n\n{help}\n````")
    if parser.epilog:
        parts.append(paragraphs(parser.epilog))
    return "\n\n".join(part for part in parts if part) + "\n"


def write_commands(app: Sphinx) -> None:
    """Writes a page for each command to `commands/`, and the list of them."""
    folder = Path(app.srcdir) / "commands"
    folder.mkdir(exist_ok=True)
    os.environ["COLUMNS"] = "76"
    parsers = cli.parsers()
    pages = {name.replace(" ", "-"): command_page(name, parser) for name, parser in parsers.items()}
    links = "\n".join(f"lotlip {name} <{name.replace(' ', '-')}>" for name in parsers)
    pages["index"] = f"""\
# Commands

`lotlip COMMAND --help` prints the same. Options that are fields of a configuration can also be lines of a YAML file:
`--config FILE`.

```{{toctree}}
:maxdepth: 1

{links}
```
"""
    for old in folder.glob("*.md"):
        if old.stem not in pages:
            old.unlink()
    for name, text in pages.items():
        file = folder / f"{name}.md"
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def link_files(app: Sphinx, docname: str, source: list[str]) -> None:
    """Turns links to Markdown files outside `docs/` into links to the pages that include them, or downloads."""
    source[0] = re.sub(r"\]\(\.\./(CHANGELOG|CONTRIBUTING)\.md", lambda match: f"]({match[1].lower()}.md", source[0])
    source[0] = re.sub(r"\]\((\.\./[^)\s]+\.md)\)", r"](path:\1)", source[0])


class Site(StandaloneHTMLBuilder):
    """The HTML builder. Sphinx's page of search results is `find.html`: `search.md` is a page of these docs."""

    def handle_page(
        self, pagename: str, addctx: dict[str, Any], templatename: str = "page.html", **others: Any
    ) -> None:
        super().handle_page("find" if templatename == "search.html" else pagename, addctx, templatename, **others)


def setup(app: Sphinx) -> None:
    """Connects the functions above."""
    StandardDomain._virtual_doc_names.pop("search", None)  # pyright: ignore
    app.add_builder(Site, override=True)
    app.connect("builder-inited", write_commands)
    app.connect("source-read", link_files)
    app.connect("autodoc-process-docstring", process_docstring, priority=400)
    app.connect("autodoc-process-signature", process_signature)
    app.connect("doctree-read", typeset_dashes)
    app.connect("missing-reference", resolve)
