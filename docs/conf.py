"""The docs site: Sphinx with MyST, furo and autodoc (`make docs`)."""

import argparse
import dataclasses
import inspect
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from docutils import nodes
from sphinx.application import Sphinx

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
default_role = "code"
smartquotes = False
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

# [`name`], and the name of a class between backticks
REFERENCE = re.compile(r"\[`(~?)([\w.]+)(?:\(\))?`\]|`((?:\w+\.)*[A-Z]\w*[a-z]\w*)`")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def to_rest(text: str) -> str:
    """Converts references and blocks of code from Markdown to reST."""
    text, title, raises = text.partition("Raises:\n")
    # napoleon expects exceptions without backticks
    raises = re.sub(r"^ +`[\w.`, ]+:", lambda match: match[0].replace("`", ""), raises, flags=re.MULTILINE)
    text = REFERENCE.sub(lambda match: f":py:obj:`{match[1] or ''}.{match[2] or match[3]}`", text + title + raises)
    return FENCE.sub(_code_block, text)


def _code_block(match: re.Match[str]) -> str:
    return f"{match[1]}.. code-block:: {match[2] or 'text'}\n\n{textwrap.indent(match[3], '    ')}"


def option_lines(config_class: type) -> Iterator[str]:
    """Returns the `Args:` of a dataclass whose fields are made by `lotlip_hf.options.option`."""
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if "help" in field.metadata:
            kind = inspect.formatannotation(hints[field.name]).removesuffix(" | None")
            kind = "` or `".join(f'"{word}"' for word in choices(hints[field.name])) or kind
            optional = "" if field.default is dataclasses.MISSING else ", *optional*"
            default = f", defaults to `{field.default!r}`" if field.default not in (dataclasses.MISSING, None) else ""
            help = field.metadata["help"].replace("*", "\\*")
            yield f"    {field.name} (`{kind}`{optional}{default}): {help}."


def has_options(value: Any) -> bool:
    """Returns whether a value is a dataclass with such fields."""
    fields = dataclasses.fields(value) if inspect.isclass(value) and dataclasses.is_dataclass(value) else ()
    return any("help" in field.metadata for field in fields)


def process_docstring(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Converts a docstring, before napoleon reads its sections."""
    if has_options(value) and "Args:" not in lines:
        end = lines.index("")  # of the first paragraph
        lines[end:end] = ["", "Args:", *option_lines(value)]
    lines[:] = to_rest("\n".join(lines)).split("\n")


def process_signature(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None] | None:
    """Shortens the signatures of configurations, whose options are listed below them."""
    from transformers import PreTrainedConfig

    if has_options(value) or inspect.isclass(value) and issubclass(value, PreTrainedConfig):
        return "(**options)", returned
    return None


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
    parts = [
        f"# lotlip {name}",
        paragraphs(parser.description or ""),
        f"```text\n{parser.format_usage().strip()}\n```",
    ]
    parts.append(f"```{{program}} lotlip {name}\n```")
    for group in parser._action_groups:
        parts += [f"## {group.title}"] if group._group_actions else []
        for action in group._group_actions:
            help = as_markdown(" ".join(formatter._expand_help(action).split()))
            parts.append(f"````{{option}} {formatter._format_action_invocation(action)}\n\n{help}\n````")
    return "\n\n".join([*parts, paragraphs(parser.epilog or "")])


COMMANDS = """\
# Commands

`lotlip COMMAND --help` prints the same. Options that are fields of a configuration can also be lines of a YAML file:
`--config FILE`.

```{toctree}
:glob:
:maxdepth: 1

*
```
"""


def write_commands(app: Sphinx) -> None:
    """Writes a page for each command to `commands/`, and the list of them."""
    os.environ["COLUMNS"] = "76"
    folder = Path(app.srcdir) / "commands"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "index.md").write_text(COMMANDS, encoding="utf-8")
    for name, parser in cli.parsers().items():
        (folder / f"{name.replace(' ', '-')}.md").write_text(command_page(name, parser), encoding="utf-8")


def link_files(app: Sphinx, docname: str, source: list[str]) -> None:
    """Turns links to Markdown files outside `docs/` into links to the pages that include them, or downloads."""
    source[0] = re.sub(r"\]\(\.\./(CHANGELOG|CONTRIBUTING)\.md", lambda match: f"]({match[1].lower()}.md", source[0])
    source[0] = re.sub(r"\]\((\.\./[^)\s]+\.md)\)", r"](path:\1)", source[0])


def setup(app: Sphinx) -> None:
    """Connects the functions above."""
    app.connect("builder-inited", write_commands)
    app.connect("source-read", link_files)
    app.connect("autodoc-process-docstring", process_docstring, priority=400)
    app.connect("autodoc-process-signature", process_signature)
    app.connect("doctree-read", typeset_dashes)
