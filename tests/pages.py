"""README.md and the pages in docs/, and the fenced blocks in them."""

import re

from product import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class Block:
    """A fenced block: its page, the language behind the fence, its text."""

    def __init__(self, page, language, text):
        self.page, self.language, self.text = page, language, text

    def __str__(self):
        return "%s: %s" % (self.page, self.text.splitlines()[0][:50])

    def begins(self, page, beginning):
        return self.page == page and self.text.startswith(beginning)

    def find_in(self, table):
        """What a table {(page, beginning): entry} has for it, or None."""
        for (page, beginning), entry in table.items():
            if self.begins(page, beginning):
                return entry
        return None


def read(page):
    return page.read_text(encoding="utf-8")


def blocks_of(page):
    fences = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", read(page))
    return [Block(page.name, language, text) for language, text in fences]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS = [block for block in BLOCKS if block.language == "sh"]


def find_block(page, beginning):
    """The text of the one block of commands of a page that begins so."""
    (block,) = [one for one in COMMANDS if one.begins(page, beginning)]
    return block.text
