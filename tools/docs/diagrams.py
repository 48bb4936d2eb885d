"""Diagrams of docs/images, drawn as plain SVG: no script, no font file, readable on light and dark pages."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

INK, LINE, PAPER = "#1b2733", "#51606e", "#ffffff"
FILLS = {"blue": "#dbe9fb", "green": "#d9f2e1", "red": "#fbdede", "grey": "#eceff2", "amber": "#fdf0cf"}
_SIZE = 14


@dataclass
class Drawing:
    """A canvas whose elements are kept in the order in which they are added."""

    width: int
    height: int
    title: str
    parts: list[str] = field(default_factory=list[str])

    def box(self, x: int, y: int, width: int, height: int, label: str, fill: str = "grey") -> None:
        """Add a rectangle with centred lines of text."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{FILLS[fill]}" stroke="{LINE}"/>'
        )
        lines = label.split("\n")
        top = y + height / 2 - (len(lines) - 1) * 9 + 5
        for number, line in enumerate(lines):
            self.text(x + width // 2, round(top + number * 18), line, "middle")

    def text(self, x: int, y: int, words: str, anchor: str = "start") -> None:
        """Add one line of text."""
        self.parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>')

    def arrow(self, x1: int, y1: int, x2: int, y2: int, *, dashed: bool = False) -> None:
        """Add a straight arrow."""
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{LINE}" stroke-width="1.5"{dashes} '
            'marker-end="url(#head)"/>'
        )

    def svg(self) -> str:
        """Return the document."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="img" font-family="Helvetica, Arial, sans-serif" font-size="{_SIZE}" '
            f'fill="{INK}">\n<title>{escape(self.title)}</title>\n'
            '<defs><marker id="head" markerWidth="9" markerHeight="9" refX="8" refY="4.5" orient="auto">'
            f'<path d="M0,0 L9,4.5 L0,9 z" fill="{LINE}"/></marker></defs>\n'
            f'<rect width="{self.width}" height="{self.height}" rx="8" fill="{PAPER}"/>\n'
        )
        return head + "\n".join(self.parts) + "\n</svg>\n"


def rendered() -> dict[str, str]:
    """Return each diagram's SVG by its name."""
    drawings = {
        "overview": _overview(),
        "generation": _generation(),
        "lineage": _lineage(),
        "exactness": _exactness(),
        "recovery": _recovery(),
        "goodput": _goodput(),
    }
    return {name: drawing.svg() for name, drawing in drawings.items()}


def _overview() -> Drawing:
    it = Drawing(760, 300, "Operator, coordinator, worker pods and object store")
    it.box(20, 20, 150, 50, "PretrainJob")
    it.box(250, 20, 250, 90, "operator\nobserve, plan, act\ncoordinator", "blue")
    it.box(590, 20, 150, 50, "status, Events,\nmetrics")
    it.arrow(170, 45, 248, 45)
    it.arrow(500, 45, 588, 45)
    for number in range(3):
        x = 20 + number * 200
        it.box(x, 190, 170, 60, f"worker pod {number}\nagent + ranks", "green")
        it.arrow(375, 110, x + 85, 188)
    it.box(630, 190, 110, 60, "object store", "amber")
    it.arrow(590, 220, 628, 220)
    it.text(20, 280, "One WebSocket per agent. Ranks write checkpoints; the operator never reads the store.")
    return it


def _generation() -> Drawing:
    it = Drawing(760, 290, "Generations before, during and after the loss of a worker")
    for x, name, members in ((20, "generation 1", "012"), (280, "generation 2", "02"), (540, "generation 3", "012")):
        it.text(x, 30, f"{name}: {len(members)} workers")
        for slot in range(3):
            here = str(slot) in members
            fill = ("green" if here else "red") if slot != 1 or x != 540 else "blue"
            label = (
                "lost" if not here else "replacement" if slot == 1 and x == 540 else f"rank {members.index(str(slot))}"
            )
            it.box(x, 45 + slot * 55, 150, 42, f"slot {slot}: {label}", fill)
    it.arrow(175, 121, 275, 121)
    it.arrow(435, 121, 535, 121)
    it.text(225, 111, "WorkerLost", "middle")
    it.text(485, 111, "WorkerJoined", "middle")
    it.text(20, 240, "The global batch and the data order are the same in every generation.")
    it.text(20, 264, "Numbers only rise. The store decides who owns a number.")
    return it


def _lineage() -> Drawing:
    it = Drawing(760, 280, "A lineage of three generations and a checkpoint that is not in it")
    it.text(20, 40, "generation 1")
    it.box(130, 18, 120, 36, "step 50", "green")
    it.box(280, 18, 120, 36, "step 100", "green")
    it.box(430, 18, 120, 36, "step 150", "red")
    it.text(560, 32, "late commit,")
    it.text(560, 50, "not in the lineage")
    it.text(20, 130, "generation 2")
    it.box(430, 108, 120, 36, "step 150", "green")
    it.text(20, 220, "generation 3")
    it.box(580, 198, 120, 36, "step 200", "green")
    it.arrow(250, 36, 278, 36)
    it.arrow(400, 36, 428, 36, dashed=True)
    it.arrow(345, 56, 445, 106)
    it.arrow(550, 140, 640, 196)
    it.text(180, 92, "parent of generation 2")
    it.text(345, 180, "parent of generation 3")
    it.text(20, 264, "The highest record and its chain of parents define one history.")
    return it


def _exactness() -> Drawing:
    it = Drawing(760, 280, "One step computed by four and by three workers")
    it.text(20, 40, "step 7: a fixed list of micro-batches")
    for number in range(12):
        it.box(300 + number * 36, 22, 32, 30, str(number), "amber")
    rows = (
        (100, "4 workers", ("0 1 2", "3 4 5", "6 7 8", "9 10 11")),
        (180, "3 workers", ("0 1 2 3", "4 5 6 7", "8 9 10 11")),
    )
    for y, name, shares in rows:
        it.text(20, y + 25, name)
        width = 432 // len(shares) - 8
        for number, share in enumerate(shares):
            it.box(300 + number * (width + 8), y, width, 40, share, "green")
    it.text(
        20, 262, "Micro-batches are never split. Only the order of the sums differs; exact: true removes that, too."
    )
    return it


def _recovery() -> Drawing:
    it = Drawing(760, 190, "Phases of a recovery from the fault to the first step")
    phases = ("detect", "re-form", "restart", "restore", "first step")
    what = (
        "evidence of\nthe loss",
        "new number,\nnew store",
        "ranks from\nwarm forks",
        "checkpoint\nverified, loaded",
        "training\nresumes",
    )
    for number, (phase, words) in enumerate(zip(phases, what, strict=True)):
        x = 20 + number * 148
        it.box(x, 50, 128, 70, words, "red" if number == 0 else "green" if number == 4 else "blue")
        it.text(x + 64, 38, phase, "middle")
        if number:
            it.arrow(x - 20, 85, x - 2, 85)
    it.text(20, 150, "fault")
    it.arrow(20, 165, 735, 165)
    it.text(735, 150, "an incident's seconds all count from the fault", "end")
    return it


def _goodput() -> Drawing:
    it = Drawing(760, 210, "A job's time divided into states")
    spans = (
        ("starting", 90, "grey"), ("training", 230, "green"), ("recovering", 100, "red"), ("redoing", 80, "amber"),
        ("training", 220, "green"),
    )  # fmt: skip
    x = 20
    for name, width, fill in spans:
        it.box(x, 40, width, 50, name, fill)
        x += width
    it.text(20, 125, "goodput ratio = training / (all time but queued and suspended)")
    it.text(20, 150, "redoing: steps that were done before and lost by a fault")
    it.text(20, 175, "evaluating, saving (checkpoint stall), holding and restoring are states of their own")
    return it
