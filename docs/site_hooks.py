"""MkDocs hooks: pages made of what lies outside `docs/`.

`recipes.md` shows the files of `recipes/`, `notebooks/*.md` the executed notebooks, `api/command_line.md` each command's
own help. Links from pages to `../recipes/...` and `../notebooks/...`, which are right where the repository is browsed,
lead to these pages; links to other files of the repository become plain text.
"""

import io
import re
from contextlib import redirect_stdout, suppress
from pathlib import Path

import nbformat
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter


ROOT = Path(__file__).parents[1]
SIZES = {
    "small": "Small models",
    "paper": "The paper's size",
    "beyond": "Beyond the paper",
    "accelerate": "Several GPUs",
}


def on_files(files, config):
    pages = {"recipes.md": recipes_page(), "api/command_line.md": command_line_page()}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, pictures = MarkdownExporter().from_notebook_node(nbformat.read(path, as_version=4))
        text = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", text)  # from one notebook to another
        folder = f"{path.stem}_files"
        for name, content in pictures["outputs"].items():
            text = text.replace(f"]({name})", f"]({folder}/{name})")
            files.append(File.generated(config, f"notebooks/{folder}/{name}", content=content))
        pages[f"notebooks/{path.stem}.md"] = text
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links out of `docs/` lead to the pages made here."""
    up = "../" * page.file.src_uri.count("/")

    def link(match: re.Match) -> str:
        text, target = match[1], match[2]
        if found := re.fullmatch(r"recipes/(\w+)/([\w-]+)\.yaml", target):
            return f"[{text}]({up}recipes.md#{found[1]}-{found[2]})"
        if found := re.fullmatch(r"recipes(?:/(\w+))?/?", target):
            return f"[{text}]({up}recipes.md" + (f"#{found[1]})" if found[1] else ")")
        if found := re.fullmatch(r"notebooks/(\w+)\.ipynb", target):
            return f"[{text}]({up}notebooks/{found[1]}.md)"
        return text

    return re.sub(rf"(?<!!)\[([^]]+)]\({up}\.\./((?!\.\.)[^)#]+)[^)]*\)", link, markdown)


def recipes_page() -> str:
    lines = [
        "# Recipes",
        "",
        "The files of `recipes/`, each a set of options of `speechllm pretrain` or `finetune`.",
        "",
    ]
    for folder, title in SIZES.items():
        lines += [f"## {title} {{#{folder}}}", ""]
        for path in sorted((ROOT / "recipes" / folder).rglob("*.yaml")):
            name = path.relative_to(ROOT / "recipes" / folder)
            anchor = "-".join([folder, *name.with_suffix("").parts])
            lines += [f"### {name} {{#{anchor}}}", "", "```yaml", path.read_text().rstrip(), "```", ""]
    return "\n".join(lines)


def command_line_page() -> str:
    from speechllm.cli import COMMANDS, main

    lines = ["# Command line", "", "What `speechllm COMMAND --help` prints.", ""]
    for name in COMMANDS:
        output = io.StringIO()
        with redirect_stdout(output), suppress(SystemExit):
            main([name, "--help"])
        lines += [f"## speechllm {name}", "", "```text", output.getvalue().rstrip(), "```", ""]
    return "\n".join(lines)
