"""What every section is made of."""

from dataclasses import dataclass

from quantlab.report.html.markup import Html, join, tag


@dataclass(frozen=True, kw_only=True)
class Part:
    """A titled part of the page.

    Attributes:
        key: its anchor, unique among the parts of a run.
        title: its heading.
        content: what follows the heading.
    """

    key: str
    title: str
    content: Html

    def render(self, level: int, prefix: str = "") -> Html:
        """The part as a section.

        Args:
            level: of its heading, 2 or 3.
            prefix: of its anchor, where several runs have the same parts.
        """
        anchor = f"{prefix}{self.key}"
        heading = tag(f"h{level}", self.title, id=f"{anchor}-title")
        return tag("section", heading, self.content, id=anchor, aria_labelledby=f"{anchor}-title")


def figure(title: str, explanation: str | None, *content: Html, class_: str | None = None) -> Html:
    """A picture with its caption above."""
    small = None if explanation is None else tag("small", explanation)
    return tag("figure", tag("figcaption", tag("strong", title), small), *content, class_=class_)


def figures(items: list[Html]) -> Html:
    """Pictures side by side where there is room."""
    return tag("div", join(items), class_="figures")


def verbatim(text: str) -> Html:
    """Lines to be copied, which the keyboard can scroll."""
    return tag("pre", tag("code", text), tabindex=0)
