"""The search of the Chinese edition: pages and queries are cut into the same words."""

from __future__ import annotations

import re

import chinese
import jieba
from sphinx.search.zh import SearchChinese

# A query has no spaces to cut it at: from left to right it is cut into the longest words that the index has.
CUT = r"""
var splitQuery = (query) => query.split(/([\u4e00-\u9fff]+)|[^\p{L}\p{N}_]+/u).filter(Boolean).flatMap((text) => {
  const {terms = {}, titleterms = {}} = Search._index || {}, words = [];
  const known = (word) => Object.hasOwn(terms, word) || Object.hasOwn(titleterms, word);
  if (!/[\u4e00-\u9fff]/.test(text)) return [text];
  for (let at = 0, size; at < text.length; at += size) {
    for (size = Math.min(8, text.length - at); size > 1 && !known(text.slice(at, at + size)); size--);
    if (size > 1) words.push(text.slice(at, at + size));
  }
  return words.length ? words : [text];
});
"""


class ChineseSearch(SearchChinese):
    """Sphinx's search by jieba's words, to which the glossary's terms are added."""

    js_splitter_code = CUT

    def init(self, options: dict[str, str]) -> None:
        """Teach jieba the terms of the glossary."""
        super().init(options)
        for term in terms():
            jieba.add_word(term)


def terms() -> list[str]:
    """Chinese terms of the glossary, without the English beside them."""
    entries = chinese.translations("book/glossary").items()
    found = [
        re.match(r"[\u4e00-\u9fff]{2,8}(?=（|$)", translated) for english, translated in entries if len(english) < 40
    ]
    return [term[0] for term in found if term]
