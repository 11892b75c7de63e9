"""What a test wants to know of an HTML page, read with an HTML parser that stands no error."""

import html5lib

XHTML = "{http://www.w3.org/1999/xhtml}"


class Page:
    def __init__(self, text):
        self.text = text
        self.root = html5lib.HTMLParser(strict=True).parse(text)

    def all(self, *tags):
        """Elements with one of these names, in order."""
        return [element for element in self.root.iter() if element.tag in {XHTML + tag for tag in tags}]

    def texts(self, *tags):
        return ["".join(element.itertext()) for element in self.all(*tags)]

    def table(self):
        """The summary: the cells of each run by the name of the row; the difference is in the same text."""
        rows = {}
        for row in self.all("table")[0].iter(XHTML + "tr"):
            head, *cells = ["".join(cell.itertext()) for cell in row]
            rows[head] = cells
        return rows
