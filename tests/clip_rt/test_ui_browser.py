"""The page in a browser, headless Chromium, against a real server of the bundled model.

Skipped where there is no Chromium or no Playwright; what the server answers is tested without.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_repository
from gateway_process import Gateway, starting
from owners import ROOT
from search_pictures import make_index, write_drawings

from clip_rt.embedded.bundled import find_model_repository
from clip_rt.moderation.policy import Policy
from clip_rt.search import Index

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: .[test]")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe: .[test]")

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium in $PATH"),
]

MAX_PAINT_MS = 1000
MAX_OVERHEAD_S = 0.5
"""Of the answer for one image, over what the server takes for it."""
LABELS = ["pizza", "owl", "rocket", "bicycle", "apple"]
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
EXAMPLES = ROOT / "examples/images"


@pytest.fixture(scope="module")
def index_folder(drawings_client, tmp_path_factory) -> Path:
    """Of 21 drawings, and a copy of one."""
    folder = tmp_path_factory.mktemp("index")
    make_index(folder, drawings_client, num=21)
    return folder


@pytest.fixture(scope="module")
def photos(index_folder) -> Path:
    return index_folder.with_name(f"{index_folder.name} photos")


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Gateway]]:
    with starting("ui", "--server", "in_process") as start:
        yield start


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """The bundled model, and one that goes by colours."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(find_model_repository(), folder, dirs_exist_ok=True)
    return tiny_repository.write(folder)


@pytest.fixture(scope="module")
def server(start, models, index_folder) -> Gateway:
    return start("--repository", models, "--model", "drawings", "tiny", "--index", index_folder)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


class Watched:
    """A page, with what it asks for and what goes wrong on it."""

    def __init__(self, context, url: str) -> None:
        self.url = url
        self.page = context.new_page()
        self.page.set_default_timeout(30_000)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._note)
        self.page.on("request", lambda request: self.requests.append(request.url))

    def _note(self, message) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def open(self, view: str = "classify"):
        self.page.goto(f"{self.url}/#{view}")
        sync_api.expect(self.page.locator("#model")).not_to_have_value("…")
        return self.page

    def check(self) -> None:
        assert self.errors == []
        ours = (self.url, "blob:", "data:image/svg")
        assert [each for each in self.requests if not each.startswith(ours)] == []


@pytest.fixture
def visit(browser) -> Iterator[Callable[..., Watched]]:
    contexts = []
    watched: list[Watched] = []

    def visit(url: str, *, dark: bool = False, viewport=WIDE, is_checked: bool = True) -> Watched:
        context = browser.new_context(
            color_scheme="dark" if dark else "light", viewport=viewport, locale="en-GB"
        )
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
        contexts.append(context)
        found = Watched(context, url)
        if is_checked:
            watched.append(found)
        return found

    yield visit
    for context in contexts:
        context.close()
    for each in watched:
        each.check()


def choose(page, name: str, what, view: str = "#view-work") -> None:
    with page.expect_file_chooser() as chooser:
        page.click(f"{view} .drop >> text={name}")
    chooser.value.set_files(what)


def classify(page, images, labels=LABELS) -> None:
    page.fill("#labels", "\n".join(labels))
    choose(page, "Choose images", images)


def wait_for_status(page, results: str, words: str) -> str:
    place = page.locator(f"{results} .status")
    sync_api.expect(place).to_contain_text(re.compile(words), timeout=60_000)
    return place.inner_text()


def read_bars(page, card: int = 0, results: str = "#classify-results") -> list[tuple[str, str]]:
    bars = page.locator(f"{results} .card").nth(card).locator(".bars li")
    return [tuple(bar.locator("span").all_text_contents()) for bar in bars.all()]


def copied(page, results: str, kind: str) -> str:
    page.click(f"{results} >> text=Copy as {kind}")
    sync_api.expect(page.locator("#toast")).to_have_text(f"Copied as {kind}")
    return page.evaluate("navigator.clipboard.readText()")


def run_python(code: str, folder: Path) -> str:
    return run([sys.executable, "-c", code], folder)


def run_shell(code: str, folder: Path) -> str:
    return run(["bash", "-e", "-o", "pipefail", "-c", code], folder)


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_accessibility(page) -> None:
    found = axe.Axe().run(page).response
    faults = [
        (each["id"], [node["html"][:120] for node in each["nodes"]])
        for each in found["violations"]
        if each["impact"] in ("serious", "critical")
    ]
    assert faults == []
    assert len(found["passes"]) > 10


def test_the_first_paint_is_at_once(visit, server, record_testsuite_property):
    seen = []
    for _ in range(3):
        page = visit(server.url).open()
        seen.append(
            page.evaluate(
                "performance.getEntriesByType('paint')"
                ".find((each) => each.name === 'first-contentful-paint').startTime"
            )
        )
    record_testsuite_property("first_contentful_paint_ms", sorted(seen))
    assert sorted(seen)[1] < MAX_PAINT_MS


def test_an_image_is_classified_at_once(visit, server, drawings_client, record_testsuite_property):
    page = visit(server.url).open()
    page.fill("#labels", "\n".join(LABELS))
    seconds = []
    for number, name in enumerate(("pizza", "rocket", "owl")):
        start_s = time.perf_counter()
        choose(page, "Choose images", EXAMPLES / f"{name}.png")
        page.locator("#classify-results .card").nth(number).locator(".bars").wait_for()
        seconds.append(time.perf_counter() - start_s)
        start_s = time.perf_counter()
        drawings_client.encode_images([EXAMPLES / f"{name}.png"])
        seconds[-1] -= time.perf_counter() - start_s
    record_testsuite_property("answer_over_embedding_s", sorted(seconds))
    assert sorted(seconds)[1] < MAX_OVERHEAD_S
    scores = drawings_client.zero_shot([EXAMPLES / "pizza.png"], LABELS)
    assert read_bars(page) == [(label, f"{100 * share:.1f} %") for label, share in scores.top(5)[0]]
    wait_for_status(page, "#classify-results", r"^3 images$")


def test_templates_and_none_of_these_change_the_answers(visit, server, drawings_client):
    page = visit(server.url).open()
    classify(page, EXAMPLES / "pizza.png", ["owl", "rocket"])
    page.check("#none")
    page.locator(".bars .none").wait_for()
    scores = drawings_client.zero_shot(
        [EXAMPLES / "pizza.png"], ["owl", "rocket"], none_of_these=True
    )
    assert read_bars(page)[0] == ("none of these", f"{100 * scores.probabilities[0, 2]:.1f} %")
    page.select_option("#templates", "own")
    page.fill("#own-templates", "an emoji of {}\n{}")
    own = ["an emoji of {}", "{}"]
    scores = drawings_client.zero_shot(
        [EXAMPLES / "pizza.png"], ["owl", "rocket"], templates=own, none_of_these=True
    )
    shown = [(label, f"{100 * share:.1f} %") for label, share in scores.top(5)[0]]
    sync_api.expect(page.locator(".bars")).to_contain_text(shown[1][1])
    assert read_bars(page) == shown


def test_a_template_that_cannot_be_used_says_why(visit, server):
    watched = visit(server.url, is_checked=False)
    page = watched.open()
    classify(page, EXAMPLES / "pizza.png")
    page.select_option("#templates", "own")
    page.fill("#own-templates", "no slot")
    sync_api.expect(page.locator("#classify-results .error")).to_contain_text("exactly one")
    page.fill("#own-templates", "a {}")
    wait_for_status(page, "#classify-results", r"^1 image$")
    sync_api.expect(page.locator("#classify-results .error")).to_be_hidden()
    # The browser itself notes an answer that is an error; the page adds nothing.
    assert all("status of 400" in each for each in watched.errors)


def test_a_hundred_files_go_in_batches_and_bad_ones_do_not_stop_the_others(visit, server, tmp_path):
    write_drawings(tmp_path / "many", 98, every=10)
    (tmp_path / "many/broken.png").write_bytes(b"no image")
    (tmp_path / "many/empty.png").write_bytes(b"")
    (tmp_path / "many/notes.txt").write_text("left out")
    watched = visit(server.url)
    page = watched.open()
    page.fill("#labels", "\n".join(LABELS))
    page.evaluate(
        """() => {
          window.seen = [];
          const bar = document.querySelector("#classify-results progress");
          new MutationObserver(() => bar.hidden || window.seen.push(bar.value)).observe(bar, {
            attributes: true,
          });
        }"""
    )
    choose(page, "Choose folder", tmp_path / "many")
    status = wait_for_status(page, "#classify-results", "could not be used")
    assert status == "100 images, 2 could not be used"
    seen = page.evaluate("window.seen")
    assert len(set(seen)) > 3
    assert seen == sorted(seen)
    asked = [each for each in watched.requests if each.endswith("/v1/classify")]
    assert 6 <= len(asked) <= 20
    assert page.locator("#classify-results .card .bars").count() == 98
    bad = page.locator("#classify-results .card.bad")
    reasons = dict(
        zip(
            bad.locator(".name").all_inner_texts(),
            bad.locator(".why").all_inner_texts(),
            strict=True,
        )
    )
    assert reasons["empty.png"] == "is empty"
    assert reasons["broken.png"].startswith("is no readable JPEG, PNG")


def test_what_is_done_can_be_stopped_and_goes_on(visit, server, tmp_path):
    write_drawings(tmp_path, 60, every=10)
    page = visit(server.url).open()
    page.fill("#labels", "\n".join(LABELS))
    page.route("**/v1/classify", lambda route: (time.sleep(0.3), route.continue_()))
    choose(page, "Choose folder", tmp_path)
    page.click("#classify-results .stop")
    wait_for_status(page, "#classify-results", r"\d+ not done$")
    page.unroute("**/v1/classify")
    page.fill("#labels", "\n".join(LABELS[:4]))
    wait_for_status(page, "#classify-results", r"^60 images$")


def test_images_are_dropped_and_pasted_and_removed(visit, server):
    page = visit(server.url).open()
    page.fill("#labels", "\n".join(LABELS))
    content = list((EXAMPLES / "pizza.png").read_bytes())
    page.evaluate(
        """(content) => {
          const file = (name) =>
            new File([new Uint8Array(content)], name, { type: "image/png" });
          const dropped = new DataTransfer();
          dropped.items.add(file("dropped.png"));
          document.querySelector("#work-drop").dispatchEvent(
            new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: dropped }),
          );
          const pasted = new DataTransfer();
          pasted.items.add(file("image.png"));
          document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: pasted }));
        }""",
        content,
    )
    wait_for_status(page, "#classify-results", r"^2 images$")
    names = page.locator("#classify-results .name").all_inner_texts()
    assert sorted(names) == ["dropped.png", "pasted-1.png"]
    assert read_bars(page, 0) == read_bars(page, 1)
    page.click("[aria-label='Remove dropped.png']")
    wait_for_status(page, "#classify-results", r"^1 image$")
    page.click("#work-count button")
    sync_api.expect(page.locator("#classify-results .empty")).to_be_visible()


HOSTILE = ['it\'s "5 %" of $HOME `id` \\ {x}', "pizza; rm -rf 'x'", "\u00e9clair \u2603 \u2028!"]


@pytest.fixture
def hostile_folder(tmp_path) -> Path:
    folder = tmp_path / "a 'b' $c"
    folder.mkdir()
    shutil.copy(EXAMPLES / "pizza.png", folder / "-pi'zz\"a $(id).png")
    shutil.copy(EXAMPLES / "owl.png", folder / "o w l.png")
    return folder


def test_what_is_copied_from_classify_does_what_is_shown(visit, server, hostile_folder):
    page = visit(server.url).open()
    page.check("#none")
    page.select_option("#top", "0")
    page.select_option("#templates", "own")
    page.fill("#own-templates", 'a "drawing" of {}\'s\n{}')
    page.fill("#labels", "\n".join([*HOSTILE, "owl"]))
    choose(page, "Choose folder", hostile_folder)
    wait_for_status(page, "#classify-results", r"^2 images$")
    shown = {
        page.locator("#classify-results .name").nth(card).text_content(): read_bars(page, card)
        for card in range(2)
    }
    folder = hostile_folder.parent
    answers = json.loads(run_shell(copied(page, "#classify-results", "curl"), folder))
    code = copied(page, "#classify-results", "Python")
    (images,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(code).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "images"
    )
    names = [Path(each).name for each in images]
    for name, row in zip(names, answers["data"], strict=True):
        assert shown[name] == [
            (each["label"], f"{100 * each['probability']:.1f} %") for each in row["labels"]
        ]
    # By lines of a terminal: a label may hold what is a line's end elsewhere.
    lines = run_python(code, folder).rstrip("\n").split("\n")
    for name, line in zip(names, lines, strict=True):
        said = ", ".join(f"{label} {share.replace(' %', '%')}" for label, share in shown[name])
        assert line.endswith(said)


def test_words_and_images_search_the_index(visit, server, photos, drawings_client, index_folder):
    page = visit(server.url).open("search")
    sync_api.expect(page.locator("#index-note")).to_contain_text("21 images")
    page.fill("#words", "an animal -red")
    page.keyboard.press("Enter")
    wait_for_status(page, "#search-results", "21 images without .red., similarity from")
    with Index.open(index_folder) as index:
        hits = index.query(drawings_client, "an animal -red", top=24)
    tiles = page.locator("#search-results .tile")
    assert tiles.locator(".line span:last-child").all_inner_texts() == [
        f"{hit.score:.3f}" for hit in hits
    ]
    assert tiles.locator(".line span:first-child").all_inner_texts() == [
        Path(hit.path).name for hit in hits
    ]
    sync_api.expect(tiles.first.locator("img")).to_have_js_property("complete", True)
    assert tiles.first.locator("img").evaluate("(image) => image.naturalWidth") > 30
    tiles.nth(4).locator("text=More like this").click()
    sync_api.expect(tiles.first.locator(".line span:first-child")).to_have_text(
        Path(hits[4].path).name
    )
    assert tiles.first.locator(".line span:last-child").inner_text() == "1.000"
    choose(page, "Choose images", EXAMPLES / "owl.png", "#view-search")
    page.fill("#words", "made of wood")
    page.click("#search-form .primary")
    wait_for_status(page, "#search-results", "21 images, similarity")
    shown = tiles.locator(".line span:last-child").all_inner_texts()
    code = copied(page, "#search-results", "Python")
    assert [line.split()[0] for line in run_python(code, EXAMPLES).splitlines()] == shown
    answer = json.loads(run_shell(copied(page, "#search-results", "curl"), EXAMPLES))
    assert [f"{each['score']:.3f}" for each in answer["data"]] == shown


def test_near_duplicates_are_grouped(visit, server, index_folder, photos):
    page = visit(server.url).open("search")
    page.fill("#duplicate-cosine", "0.9")
    page.click("#find-duplicates")
    wait_for_status(page, "#search-results", "group")
    with Index.open(index_folder) as index:
        groups = index.duplicates(threshold=0.9)
    assert page.locator("#search-results h2:has-text('Group')").count() == len(groups) > 0
    lines = run_python(copied(page, "#search-results", "Python"), photos).splitlines()
    assert len(lines) == len(groups)
    answer = json.loads(run_shell(copied(page, "#search-results", "curl"), photos))
    assert answer["num_groups"] == len(groups)


def test_without_an_index_the_page_says_how_to_make_one(
    visit, start, tmp_path, photos, drawings_client
):
    server = start("--index", tmp_path / "new index")
    page = visit(server.url).open("search")
    command = page.locator("#search-results .command code")
    assert command.inner_text() == f"clip-rt index --index '{tmp_path}/new index' ~/Pictures"
    sync_api.expect(page.locator("#words")).to_be_disabled()
    with Index.open(tmp_path / "new index", create=True) as index:
        index.update(drawings_client, [photos])
    page.click("text=Look again")
    sync_api.expect(page.locator("#index-note")).to_contain_text("21 images")
    page.fill("#words", "an owl")
    page.keyboard.press("Enter")
    wait_for_status(page, "#search-results", "21 images")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """Drawings by what they are: two kinds that the model tells apart, mostly."""
    folder = tmp_path_factory.mktemp("labelled")
    paths = write_drawings(tmp_path_factory.mktemp("all"), 64, every=20)
    for name, path in paths.items():
        kind = "face" if "face" in name else "other_things"
        (folder / kind).mkdir(exist_ok=True)
        shutil.copy(path, folder / kind / path.name)
    assert len(list((folder / "face").iterdir())) >= 4
    return folder


def test_a_threshold_moves_precision_and_recall(visit, server, labelled, drawings_client):
    page = visit(server.url).open("thresholds")
    choose(page, "Choose folder", labelled, "#view-thresholds")
    status = wait_for_status(page, "#thresholds-results", "fits")
    positives, negatives = (
        sorted((labelled / kind).iterdir()) for kind in ("face", "other_things")
    )
    assert status == f"{len(positives) + len(negatives)} images; “face” fits {len(positives)}"
    assert page.locator("#classes input").evaluate_all(
        "(all) => all.map((each) => [each.value, each.checked])"
    ) == [["face", True], ["other_things", False]]
    similarities = drawings_client.zero_shot([*positives, *negatives], ["face"]).similarities[:, 0]

    def check() -> float:
        threshold = float(page.input_value("#threshold"))
        is_found = similarities >= threshold
        right = int(is_found[: len(positives)].sum())
        num_found = int(is_found.sum())
        shown = dict(
            zip(
                page.locator("#figures dt").all_inner_texts(),
                page.locator("#figures dd:not(.note)").all_inner_texts(),
                strict=True,
            )
        )
        assert shown["Found"] == str(right)
        assert shown["Missed"] == str(len(positives) - right)
        assert shown["Wrongly found"] == str(num_found - right)
        assert shown["Rightly left"] == str(len(negatives) - num_found + right)
        assert shown["Recall"] == f"{100 * right / len(positives):.1f} %"
        expected = f"{100 * right / num_found:.1f} %" if num_found else "–"
        assert shown["Precision"] == expected
        assert expected in page.get_attribute("#threshold", "aria-valuetext")
        return threshold

    best = check()
    page.focus("#threshold")
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    assert check() > best
    page.keyboard.press("End")
    assert check() > similarities.max()
    page.keyboard.press("Home")
    assert check() < similarities.min()
    plot = page.locator("#histogram").bounding_box()
    page.mouse.move(plot["x"] + 10, plot["y"] + 30)
    page.mouse.down()
    page.mouse.move(plot["x"] + plot["width"] * 0.6, plot["y"] + 30, steps=4)
    page.mouse.up()
    low, high = (float(page.get_attribute("#threshold", name)) for name in ("min", "max"))
    assert check() == pytest.approx(low + 0.6 * (high - low), abs=(high - low) / 100)
    shown = page.locator("#figures dd:not(.note)").all_inner_texts()
    lines = run_python(copied(page, "#thresholds-results", "Python"), labelled.parent).splitlines()
    assert lines[0].endswith(f"right {shown[3]}")
    assert f"{100 * float(lines[2].split()[1]):.1f} %" == shown[1]
    answers = run_shell(copied(page, "#thresholds-results", "curl"), labelled.parent)
    # One object a request, one after another.
    decoder, parts = json.JSONDecoder(), []
    while answers:
        part, end = decoder.raw_decode(answers)
        parts.append(part)
        answers = answers[end:].lstrip()
    assert parts[-1]["recall"][0] == 1
    assert sum(len(each["data"]) for each in parts[:-1]) == len(similarities)
    page.click("#best-f1")
    threshold = check()
    assert threshold == pytest.approx(best, abs=(high - low) / 500)
    with page.expect_download() as download:
        page.click("#save-policy")
    assert download.value.suggested_filename == "face-policy.json"
    policy = Policy.load(download.value.path())
    actions = drawings_client.moderate([*positives, *negatives], policy).actions
    assert [each == "review" for each in actions] == (similarities >= threshold).tolist()
    page.check("#classes input[value=other_things]")
    wait_for_status(page, "#thresholds-results", "other things")


def test_one_label_alone_is_no_set(visit, server, labelled):
    page = visit(server.url, is_checked=False).open("thresholds")
    choose(page, "Choose folder", labelled / "face", "#view-thresholds")
    error = page.locator("#thresholds-results .error")
    sync_api.expect(error).to_contain_text("Add images that it does not fit")


def test_two_models_are_compared(visit, server, tmp_path):
    page = visit(server.url).open("compare")
    page.fill("#labels", "red\nowl\npizza")
    choose(page, "Choose images", sorted(EXAMPLES.glob("*.png")))
    status = wait_for_status(page, "#compare-results", "differ")
    cards = page.locator("#compare-results .card")
    num_differ = 0
    for card in range(cards.count()):
        a, b = (
            place.locator("li").first.locator("span").first.inner_text()
            for place in cards.nth(card).locator(".bars").all()
        )
        is_marked = cards.nth(card).locator(".tag").count() == 1
        assert is_marked == (a != b)
        num_differ += is_marked
    assert num_differ > 0
    assert status == f"{cards.count()} images, {num_differ} differ"
    assert set(cards.locator("h3").all_inner_texts()) == {"drawings", "tiny"}
    lines = run_python(copied(page, "#compare-results", "Python"), EXAMPLES).splitlines()
    assert sum(line.endswith("differs") for line in lines) == num_differ
    page.check("#only-different")
    assert page.locator("#compare-results .card:visible").count() == num_differ
    page.select_option("#model-b", "drawings")
    wait_for_status(page, "#compare-results", ", 0 differ")
    # The same images are there in Classify.
    page.click("nav >> text=Classify")
    wait_for_status(page, "#classify-results", f"^{cards.count()} images$")


def test_one_model_cannot_be_compared(visit, start, index_folder):
    server = start("--index", index_folder)
    page = visit(server.url).open("compare")
    empty = page.locator("#compare-results .empty")
    sync_api.expect(empty).to_contain_text("Only drawings is served here")
    check_accessibility(page)


def test_the_page_goes_on_when_its_server_is_back(visit, start, index_folder):
    server = start("--index", index_folder)
    watched = visit(server.url, is_checked=False)
    page = watched.open()
    classify(page, EXAMPLES / "pizza.png")
    wait_for_status(page, "#classify-results", r"^1 image$")
    assert watched.errors == []
    server.process.kill()
    server.process.wait(timeout=60)
    choose(page, "Choose images", EXAMPLES / "owl.png")
    banner = page.locator("#banner")
    sync_api.expect(banner).to_contain_text("The server is gone")
    wait_for_status(page, "#classify-results", "1 not done")
    _, port = server.address()
    start("--index", index_folder, port=port)
    sync_api.expect(banner).to_be_empty(timeout=30_000)
    wait_for_status(page, "#classify-results", r"^2 images$")
    # The browser itself says that nobody answers; the page says nothing more.
    assert all("ERR_CONNECTION" in each or "ERR_EMPTY" in each for each in watched.errors)


def test_a_form_that_is_sent_too_early_loads_no_page_anew(visit, server):
    watched = visit(server.url)
    page = watched.page
    held = []
    page.route("**/ui/settings", lambda route: held.append(route))
    page.goto(f"{watched.url}/#search")
    page.wait_for_function("() => performance.timing.loadEventEnd > 0")
    sync_api.expect(page.locator("#words")).to_be_disabled()
    page.evaluate("window.isSame = true")
    for form in page.locator("form.panel").all():
        form.evaluate("(form) => form.requestSubmit()")
    held[0].continue_()
    page.fill("#words", "an owl")
    page.keyboard.press("Enter")
    page.locator("#search-results .tile img").first.wait_for()
    assert page.evaluate("window.isSame")


def test_a_token_is_asked_for(visit, start, index_folder):
    server = start("--index", index_folder, CLIP_RT_TOKENS="s3cret")
    watched = visit(server.url, is_checked=False)
    page = watched.page
    page.goto(f"{watched.url}/#search")
    page.fill("#token", "wrong")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#token-dialog .error")).to_be_visible()
    check_accessibility(page)
    page.fill("#token", "s3cret")
    page.keyboard.press("Enter")
    page.fill("#words", "an owl")
    page.keyboard.press("Enter")
    image = page.locator("#search-results .tile img").first
    image.wait_for()
    # It is fetched with the token, and an image that has no address yet is complete too.
    page.wait_for_function("(image) => image.naturalWidth > 30", arg=image.element_handle())
    code = copied(page, "#search-results", "curl")
    assert "s3cret" not in code
    answer = run_shell(f"CLIP_RT_TOKEN=s3cret\n{code}", EXAMPLES)
    assert json.loads(answer)["data"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_no_serious_fault_of_accessibility(visit, server, labelled, tmp_path, dark, viewport):
    (tmp_path / "broken.png").write_bytes(b"no image")
    page = visit(server.url, dark=dark, viewport=viewport).open()

    def check() -> None:
        check_accessibility(page)
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= viewport["width"]

    check()
    page.check("#none")
    classify(page, [*sorted(EXAMPLES.glob("*.png")), tmp_path / "broken.png"])
    wait_for_status(page, "#classify-results", "could not be used")
    check()
    page.click("nav >> text=Compare")
    wait_for_status(page, "#compare-results", "differ")
    check()
    page.click("nav >> text=Search")
    page.fill("#words", "an owl")
    page.keyboard.press("Enter")
    wait_for_status(page, "#search-results", "images")
    check()
    page.click("nav >> text=Thresholds")
    check()
    choose(page, "Choose folder", labelled, "#view-thresholds")
    wait_for_status(page, "#thresholds-results", "fits")
    check()


def test_colours_follow_the_system_and_the_toggle(visit, server):
    page = visit(server.url, dark=True).open()

    def background() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    dark = background()
    assert page.get_attribute("#theme", "aria-pressed") == "true"
    page.click("#theme")
    light = background()
    assert light != dark
    page.reload()
    assert background() == light
    page.click("#theme")
    assert background() == dark


def test_all_is_done_by_keyboard(visit, server):
    page = visit(server.url).open()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break  # Beyond the last is the browser's own.
        name = page.evaluate(
            "document.activeElement.id || document.activeElement.textContent.trim()"
        )
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", name
        reached.add(name)
    assert {"Search", "model", "theme", "Choose images", "labels", "templates", "none"} <= reached
