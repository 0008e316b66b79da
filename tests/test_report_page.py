"""The HTML report: what it says, that nothing in it runs or is loaded, and that a browser shows it."""

from __future__ import annotations

import functools
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_helpers import EVIL, full, invalid, layer

from rep_backbones.export.html import Box, Found, Row, Sample, Sketches, commands, page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
JPEG = bytes.fromhex("ffd8ffd9")
CORNERS = [(1.0, 2.0), (30.0, 2.0), (30.0, 20.0), (1.0, 20.0)]


def sketches() -> Sketches:
    box = Box(CORNERS, EVIL, 0.87)
    found = [Found("trained", [box], more=3), Found("onnx", [box, box])]
    return Sketches(
        layers=[("RepVGGBlock at model.1", "<svg></svg>")],
        rows=[Row(0, EVIL, 0, 1, 1), Row(1, "RepVGGBlock", 3, 2, 1)],
        samples=[Sample(EVIL, JPEG, (64, 48), found)],
    )


class Elements(html.parser.HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_full_report_is_valid() -> None:
    assert invalid(full()) == []


def test_it_says_what_the_report_says() -> None:
    text = Elements(page(full(), sketches())).text
    for said in (
        "Not proved",
        "is off by much",
        "114 → 79",
        "6 layers, 1 off",
        "not comparable",
        "3: kxk, 1x1, identity",
        "ONNX INT8: proved",
        "NCNN: not run",
        "TensorRT: missing",
        "59.21 -0.68",
        "batch 8",
        "bias correction",
        "8.2 dB",
        "4 by multi-branch (the best 1 shown), 2 by ONNX",
        "18.1 MB",
        "0" * 64,
    ):
        assert said in " ".join(text.split()), said


@pytest.mark.parametrize(
    ("status", "said"), [(0, ("good", "Proved")), (3, ("bad", "Not proved")), (4, ("warn", "Proved, but not complete"))]
)
def test_verdicts(status: int, said: tuple[str, str]) -> None:
    found = re.search(r'class="verdict (\w+)">\s*<h2>([^<]*)</h2>', page({**full(), "status": status}))
    assert found and found.groups() == said


def test_nothing_runs_and_nothing_is_loaded() -> None:
    """Of names that hold markup, and of the page's own parts."""
    text = page(full(), sketches())
    found = Elements(text).found
    assert not {"script", "iframe", "object", "embed", "link", "base", "form", "foreignobject"} & {tag for tag, _ in found}
    for tag, attributes in found:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:image/jpeg;base64,")), f"{tag} {name}={target}"
    assert not re.search(r"@import|url\((?!#)", text)
    policy = next(a["content"] for tag, a in found if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")


def test_escaped_names_can_be_read() -> None:
    text = page(full(), sketches())
    assert text.count("&lt;script&gt;") >= 6 and EVIL in Elements(text).text


def test_pictures_are_the_page_s_own() -> None:
    """Their colours are its variables, their rules are not its rules, and no two things have one name."""
    text = page(full(), sketches())
    assert text.count("<style") == 1 and "<metadata" not in text
    assert text.count("var(--hue0)") > 5 and "#0601" not in text and "#0101" not in text
    named: dict[str | None, set[str]] = {}
    for tag, attributes in Elements(text).found:
        if "id" in attributes:
            named.setdefault(attributes["id"], set()).add(f"{tag} {attributes}")
    assert {name for name, things in named.items() if len(things) > 1} == set()
    assert not [name for name in named if re.fullmatch(r".*_\d+", str(name))], "patch_1 is in every picture"
    assert "层$\\frac$" in text, "letters that the font lacks, and no formula"


def test_a_report_of_little() -> None:
    """No layers, no artefact, nothing measured: what is not known is not shown."""
    report = full()
    report.pop("trained")
    report |= {"layers": [], "proofs": {}, "artifacts": {}, "notes": [], "counts": {}}
    assert invalid(report) == []
    text = Elements(page(report)).text
    for absent in ("AP", "Latency", "INT8", "What it finds", "Error per layer", "Before and after"):
        assert absent not in text, absent
    assert "No multi-branch layer was merged" in text


def test_ap_of_data_without_any_object() -> None:
    report = full()
    for about in (report["trained"], *report["artifacts"].values()):
        about.pop("ap", None)
    report["trained"]["ap"] = dict.fromkeys(("ap", "ap50", "ap75", "small", "medium", "large"))
    assert invalid(report) == []
    assert Elements(page(report)).text.count("–") >= 6


def test_a_model_of_many_branches_and_odd_shares() -> None:
    shares = {f"branch {index}": None if index == 2 else 0.1 for index in range(12)}
    text = page({**full(), "layers": [layer(0, shares=shares, branches=list(shares)), layer(1, error=0.0, shares={})]})
    assert all(f"</i>branch {index}</span>" in text for index in range(12))


def test_commands() -> None:
    assert [command for _, command in commands(full())] == [
        "python tools/fuse_export.py 'my best.pt' --format onnx engine --imgsz 480 640 --batch 8 --dynamic --trust",
        "python tools/fuse_export.py --check 'my best_deploy_report.json'",
        "yolo predict model='my best_deploy.onnx' source=a.jpg",
        "yolo predict model='my best_deploy_int8.onnx' source=a.jpg",
        "trtexec --onnx='my best_deploy.onnx'",
    ]


# ---- in a browser ---------------------------------------------------------------------------------------------------------

MEASURE = """
<body><script>
addEventListener("load", () => {
  const d = frames[0].document, boxes = [...d.querySelectorAll(".box")];
  const seen = (e) => e.getBoundingClientRect().width > 0 && e.getBoundingClientRect().height > 0;
  document.body.dataset.found = JSON.stringify({
    title: d.title, text: d.body.innerText, height: d.documentElement.scrollHeight,
    overflow: d.documentElement.scrollWidth - d.documentElement.clientWidth,
    tallest: Math.max(...boxes.map((b) => b.clientHeight)), scrolled: Math.max(...boxes.map((b) => b.scrollHeight)),
    svgs: [...d.querySelectorAll("svg")].map(seen), paper: getComputedStyle(d.body).backgroundColor,
  });
});
</script><iframe src="report.html" style="width:%dpx;height:900px"></iframe>
"""


@functools.cache
def starts() -> str:
    """Why no browser can be used here; empty if one can."""
    if CHROMIUM is None:
        return "no chromium is installed"
    ran = subprocess.run([*browser(), "--dump-dom", "about:blank"], capture_output=True, text=True, timeout=120, check=False)
    return "" if ran.returncode == 0 and "<html>" in ran.stdout else f"chromium does not start: {ran.stderr[-200:]}"


def browser(dark: bool = False) -> list[str]:
    return [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
        "--virtual-time-budget=3000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_a_browser(tmp_path: Path, width: int, dark: bool) -> None:
    if reason := starts():
        pytest.skip(reason)
    (tmp_path / "report.html").write_text(page(full(130), sketches()), encoding="utf-8")
    (tmp_path / "frame.html").write_text(MEASURE % width, encoding="utf-8")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [*browser(dark), profile, "--dump-dom", (tmp_path / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, "errors, and what the policy forbids"
    attribute = re.search(r'data-found="([^"]*)"', done.stdout)
    assert attribute, "the page did not load"
    found = json.loads(html.unescape(attribute[1]))
    assert found["title"] == "my best_deploy: Not proved", "no script has run"
    for said in ("Not proved", "What was fused", "Error per layer", "AP and latency", "INT8", "What it finds", "Commands"):
        assert said in found["text"], said
    assert found["height"] > 1500 and all(found["svgs"]) and len(found["svgs"]) >= 7
    assert found["overflow"] == 0, "wide tables scroll in their boxes, not the page"
    assert found["scrolled"] > 3000 and found["tallest"] < 500, "130 layers scroll in their box"
    assert (found["paper"] == "rgb(18, 21, 27)") is dark
