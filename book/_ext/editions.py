"""Both editions of the book from one execution of the notebooks: `en/` and `zh/`, and what a site needs besides.

python book/_ext/editions.py sources build/executed _build/source   # a folder for each edition
python book/_ext/editions.py site _build                            # both built editions become _build/html
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import chinese
import yaml
from lighter import lighten

ROOT = Path(__file__).resolve().parents[2]
IN_CHINESE = {
    "language": "zh_CN",
    "locale_dirs": ["book/locale"],
    "gettext_compact": False,
    "nb_code_prompt_show": "显示代码",
    "nb_code_prompt_hide": "隐藏代码",
    "togglebutton_hint": "点击显示",
    "togglebutton_hint_hide": "点击隐藏",
    "ogp_image_alt": "五个字符，每个一幅手写图，还有第六幅。它是哪一个？",
}
FOOTER = "<p>文字和代码采用 MIT 许可证；图中所示，是已记录的训练测得的结果。</p>"
PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<title>metatutor</title>
{head}
<style>body {{ font: 1.1rem/1.6 system-ui, sans-serif; max-width: 36rem; margin: 15vh auto; padding: 0 1rem;
  color: #222; background: #fff }} a {{ color: #2f5d9e }}
@media (prefers-color-scheme: dark) {{ body {{ color: #ddd; background: #121212 }} a {{ color: #8ab4f8 }} }}</style>
</head>
<body>
{body}
</body>
</html>
"""
CHOOSE = """\
<meta name="description" content="How does a CNN learn a new class from one picture? A book in two languages" />
<script>location.replace((navigator.language.startsWith("zh") ? "zh" : "en") + "/book/index.html");</script>"""
LANGUAGES = """\
<p><a href="{up}en/book/index.html">How does a CNN learn a new class from one picture?</a></p>
<p lang="zh"><a href="{up}zh/book/index.html">CNN 怎样从一张图片学会一个新类别？</a></p>"""
LOST = '<p>There is no such page in this book.</p>\n<p lang="zh">本书没有这个页面。</p>\n'


def config(language: str, collect: bool = False) -> dict[str, Any]:
    """The book's settings for one edition, in which messages are collected or not; notebooks are executed already."""
    settings = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    settings["execute"]["execute_notebooks"] = "off"
    address, folder = settings["html"]["baseurl"], chinese.FOLDERS[language]
    settings["html"]["baseurl"] = f"{address}{folder}/"
    options = settings["sphinx"]["config"]
    options |= {"metatutor_address": address, "metatutor_collect": collect, "ogp_site_url": f"{address}{folder}/"}
    if language == "zh_CN":
        options |= IN_CHINESE
        settings["repository"]["branch"] = "zh"  # where Colab finds notebooks with Chinese text
        settings["author"], settings["html"]["extra_footer"] = "metatutor 作者团队", FOOTER
    return settings


def write_sources(executed: Path, folder: Path, collect: bool = False) -> None:
    """A folder of sources for each edition: prose, executed notebooks, settings.

    Messages are collected from what notebooks show too, so those that show nothing would lose their translations.
    """
    if collect and (silent := [path.name for path in sorted(executed.glob("*.ipynb")) if not _shows_something(path)]):
        raise SystemExit(f"not executed: {', '.join(silent)}; delete {executed} and run make translations again")
    shutil.rmtree(folder, ignore_errors=True)
    shown = chinese.translations(chinese.OUTPUTS)
    for language, name in chinese.FOLDERS.items():
        sources = folder / name
        shutil.copytree(ROOT / "book", sources / "book", ignore=shutil.ignore_patterns("__pycache__", "*.mo"))
        contents = (ROOT / "_toc.yml").read_text(encoding="utf-8")
        for english, translated in chinese.translations("book/index").items() if language == "zh_CN" else ():
            contents = contents.replace(f"caption: {english}\n", f"caption: {translated}\n")
        if language == "zh_CN":
            contents = contents.replace("file: book/api\n", "file: book/api\n        title: 参考手册（英文）\n")
            for pad in (sources / "book/_static" / name for name in chinese.PADS):
                pad.write_text(chinese.in_pad(pad, chinese.speaker(shown)), encoding="utf-8")
        (sources / "_toc.yml").write_text(contents, encoding="utf-8")
        written = yaml.safe_dump(config(language, collect), allow_unicode=True, sort_keys=False)
        (sources / "_config.yml").write_text(written, encoding="utf-8")
        (sources / "notebooks").mkdir()
        for path in sorted(executed.glob("*.ipynb")):
            notebook = json.loads(path.read_text(encoding="utf-8"))
            if language == "zh_CN":
                notebook = chinese.with_figure_texts(notebook, chinese.translations(f"notebooks/{path.stem}"), shown)
            (sources / "notebooks" / path.name).write_text(json.dumps(notebook, ensure_ascii=False), encoding="utf-8")


def _shows_something(notebook: Path) -> bool:
    return any(cell.get("outputs") for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"])


def write_site(folder: Path) -> None:
    """Put both built editions under one roof, with a first page, a page for wrong addresses and a map."""
    site = folder / "html"
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    for name in chinese.FOLDERS.values():
        shutil.move(folder / name / "_build/html", site / name)
        lighten(site / name)
    say = chinese.speaker(chinese.translations(chinese.THEME))
    for path in sorted((site / "zh").rglob("*.html")):
        path.write_text(chinese.in_page(path.read_text(encoding="utf-8"), say), encoding="utf-8")
    for path in sorted((site / "zh/_sources/notebooks").glob("*.ipynb")):  # what the button for downloads gives
        notebook = json.loads(path.read_text(encoding="utf-8"))
        translated, _ = chinese.in_chinese(notebook, chinese.translations(f"notebooks/{path.stem}"))
        path.write_text(json.dumps(translated, indent=1, ensure_ascii=False), encoding="utf-8")
    address = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["html"]["baseurl"]
    (site / "index.html").write_text(PAGE.format(head=CHOOSE, body=LANGUAGES.format(up="")), encoding="utf-8")
    lost = LOST + LANGUAGES.format(up=address)  # shown at any depth, so its links are whole addresses
    (site / "404.html").write_text(PAGE.format(head="", body=lost), encoding="utf-8")
    pages = [p.relative_to(site / "en").as_posix() for p in sorted((site / "en").rglob("*.html"))]
    pages = [page for page in pages if page.startswith(("book/", "notebooks/"))]
    urls = "\n".join(_entry(address, name, page) for page in pages for name in chinese.FOLDERS.values())
    spaces = 'xmlns="http://www.sitemaps.org/schemas/sitemap/0.9" xmlns:xhtml="http://www.w3.org/1999/xhtml"'
    site_map = f'<?xml version="1.0" encoding="UTF-8"?>\n<urlset {spaces}>\n{urls}\n</urlset>\n'
    (site / "sitemap.xml").write_text(site_map, encoding="utf-8")
    (site / "robots.txt").write_text(f"User-agent: *\nSitemap: {address}sitemap.xml\n", encoding="utf-8")
    (site / ".nojekyll").touch()


def _entry(address: str, name: str, page: str) -> str:
    others = "".join(
        f'<xhtml:link rel="alternate" hreflang="{other}" href="{address}{other}/{page}"/>'
        for other in chinese.FOLDERS.values()
    )
    return f"<url><loc>{address}{name}/{page}</loc>{others}</url>"


if __name__ == "__main__":
    if sys.argv[1] == "sources":
        write_sources(Path(sys.argv[2]), Path(sys.argv[3]), collect="collect" in sys.argv[4:])
    else:
        write_site(Path(sys.argv[2]))
