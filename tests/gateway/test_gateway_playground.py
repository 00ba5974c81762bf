"""The playground in a real browser, before a real gateway and server."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from chromium import find_chromium
from conftest import Server, wait_until
from gateways import Gateway, running_gateway
from PIL import Image
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

from genserve import Client

TIMEOUT_MS = 30_000
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
SHIFTS = """
window.shifts = 0;
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifts += entry.value;
}).observe({ type: "layout-shift", buffered: true });
"""
"""Script that adds up how far the page's parts move by themselves."""
LONG = {"steps": "60", "size": "256x256"}
"""Settings of an image that takes seconds."""
FAILED_ANSWER = re.compile("Failed to load resource: the server responded with a status of 4")


@dataclass
class Visit:
    """A page and what happened on it."""

    page: Page
    errors: list[str] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def fill(self, prompt: str, *, count: int = 1, **fields: str) -> None:
        """Fill in the images form, by the names of its fields."""
        self.page.get_by_label("Prompt", exact=True).fill(prompt)
        self.page.locator(".choices label").nth(count - 1).click()
        for name, value in fields.items():
            control = self.page.locator(f"#image-form [name={name}]")
            control.select_option(value) if name in {"size", "priority"} else control.fill(value)

    def wait_for_images(self, count: int = 1) -> None:
        expect(self.page.locator(".tile[data-state=done]")).to_have_count(count)
        expect(self.page.locator("#run")).to_have_attribute("aria-busy", "false")

    def field(self, name: str) -> str:
        return self.page.locator(f"#image-form [name={name}]").input_value()

    def download(self, button: Any) -> bytes:
        with self.page.expect_download() as started:
            button.click()
        return started.value.path().read_bytes()

    def task_ids(self) -> list[str]:
        return [each.headers["x-request-id"] for each in self.requests if each.url.endswith("/v1/images/generations")]


@pytest.fixture(scope="module")
def running(running_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), running_server.grpc) as gateway:
        yield gateway


@pytest.fixture
def gateway(running: Gateway, server: Server) -> Gateway:
    return running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**chromium.launch)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, gateway: Gateway) -> Iterator[Callable[..., Visit]]:
    """Return a function that opens the page, with options of a browser context."""
    visits: list[Visit] = []

    def visit(address: str = gateway.url, **options: Any) -> Visit:
        page = browser.new_context(**options).new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.add_init_script(SHIFTS)
        found = Visit(page)
        page.on("console", lambda message: message.type == "error" and found.errors.append(message.text))
        page.on("pageerror", lambda error: found.errors.append(str(error)))
        page.on("request", lambda request: found.requests.append(request))  # noqa: PLW0108  # it marks the function
        page.goto(address)
        visits.append(found)
        return found

    expect.set_options(timeout=TIMEOUT_MS)
    yield visit
    for each in visits:
        each.page.context.close()
        assert each.errors == []
        addresses = [request.url for request in each.requests]
        assert [url for url in addresses if not re.match(r"(http://localhost:\d+/|data:|blob:)", url)] == []


@pytest.fixture
def visit(open_page: Callable[..., Visit]) -> Visit:
    return open_page()


def test_image_appears_step_by_step(visit: Visit, grpc_client: Client) -> None:
    page = visit.page
    expect(page.locator("#health")).to_have_text("Ready")
    expect(page.get_by_text("Describe an image, and watch it appear.")).to_be_visible()
    visit.fill("a red circle on a blue background", seed="7", **LONG)
    page.get_by_role("button", name="Generate image").click()
    preview = page.locator(".tile[data-state=running] .preview")
    expect(preview).to_be_visible()
    assert page.locator(".tile .final").get_attribute("src") is None
    expect(page.locator(".tile .state")).to_have_text(re.compile(r"Step \d+ of 60"))
    frame = page.locator(".frame").bounding_box()
    visit.wait_for_images()
    assert page.locator(".tile progress").evaluate("bar => bar.value") == 1
    expect(page.locator("#run-figures")).to_have_text(re.compile(r"1 image in [\d.]+ s"))
    expect(page.locator("#image-live")).to_have_text(re.compile(r"1 image in"))
    assert page.locator(".frame").bounding_box() == frame
    assert page.evaluate("window.shifts") < 0.01
    expected = grpc_client.generate("a red circle on a blue background", seed=7, steps=60, height=256, width=256)
    assert visit.download(page.get_by_role("link", name="Download")) == expected.data


def test_cancel_stops_the_work(visit: Visit, grpc_client: Client) -> None:
    page = visit.page
    visit.fill("unwanted", count=2, **LONG)
    page.locator("#generate").click()
    expect(page.locator(".tile[data-state=running]")).to_have_count(2)
    page.get_by_role("button", name="Cancel image 2").click()
    expect(page.locator(".tile[data-state=cancelled]")).to_have_count(1)
    expect(page.locator(".tile[data-state=running]")).to_have_count(1)
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.locator(".tile[data-state=cancelled]")).to_have_count(2)
    expect(page.locator("#run-figures")).to_have_text("Cancelled")
    ids = visit.task_ids()
    assert len(ids) == 2
    for task_id in ids:
        wait_until(lambda: grpc_client.task(task_id).state == "cancelled", what="the cancellation")  # noqa: B023


def test_settings_of_an_image_make_it_again(visit: Visit) -> None:
    page = visit.page
    visit.fill("a large yellow star", count=3, seed="41", steps="4", negative_prompt="green", priority="high")
    page.get_by_role("button", name="Generate 3 images").click()
    visit.wait_for_images(3)
    captions = [text.replace("\N{MULTIPLICATION SIGN}", "x") for text in page.locator(".tile .state").all_inner_texts()]
    assert captions == [f"Seed {seed}, 4 steps, 128 x 128" for seed in (41, 42, 43)]
    second = page.locator(".tile").nth(1)
    wanted = visit.download(second.get_by_role("link", name="Download"))
    visit.fill("something else", steps="9", negative_prompt="", seed="")
    second.get_by_role("button", name="Use settings").click()
    found = [visit.field(name) for name in ("prompt", "negative_prompt", "seed", "steps", "size", "true_cfg_scale")]
    assert found == ["a large yellow star", "green", "42", "4", "128x128", "4"]
    page.reload()  # Settings and images survive it.
    assert visit.field("seed") == "42"
    expect(page.locator(".thumbnails li")).to_have_count(3)
    page.get_by_role("button", name="Generate image").click()
    visit.wait_for_images()
    assert visit.download(page.locator(".tile").get_by_role("link", name="Download")) == wanted
    page.locator(".thumbnails button").first.click()
    viewer = page.get_by_role("dialog")
    expect(viewer.get_by_role("heading", name="a large yellow star")).to_be_visible()
    assert "Seed\n41" in viewer.locator("dl").inner_text()
    page.keyboard.press("ArrowRight")
    assert "Seed\n42" in viewer.locator("dl").inner_text()
    viewer.get_by_role("button", name="Delete").click()
    expect(page.locator(".thumbnails li")).to_have_count(2)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("button", name="Delete 2 images?").click()
    expect(page.locator("#gallery")).to_be_hidden()


@pytest.mark.parametrize("way", ["drop", "choose"])
def test_settings_come_from_a_file(way: str, visit: Visit, grpc_client: Client) -> None:
    page = visit.page
    prompt, seed = 'a "seed": 5 of a Käfer', 2**62 + 1  # more digits than JavaScript's numbers hold
    made = grpc_client.generate(prompt, seed=seed, steps=2, height=96, width=160)
    put = {"drop": drop, "choose": choose}[way]
    put(page, made.data)
    expect(page.get_by_role("status")).to_contain_text("The settings are in the form")
    found = [visit.field(name) for name in ("prompt", "seed", "size", "width", "height", "steps")]
    assert found == [prompt, str(seed), "custom", "160", "96", "2"]
    page.get_by_role("button", name="Generate image").click()
    visit.wait_for_images()
    assert visit.download(page.get_by_role("link", name="Download")) == made.data
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    put(page, buffer.getvalue())
    expect(page.get_by_role("status")).to_have_text("a.png has no settings of GenServe.")


def test_adapters_are_sent_and_come_back(visit: Visit, grpc_client: Client) -> None:
    page = visit.page
    visit.fill("a large green square", seed="1", steps="8", lora="neon, blueprint=0.6", cache="0.125")
    page.get_by_role("button", name="Generate image").click()
    visit.wait_for_images()
    wanted = visit.download(page.get_by_role("link", name="Download"))
    lora = {"neon": 1.0, "blueprint": 0.6}
    assert wanted == grpc_client.generate("a large green square", seed=1, steps=8, lora=lora, cache=0.125).data
    visit.fill("something else", lora="", cache="")
    page.get_by_role("button", name="Use settings").click()
    assert [visit.field(name) for name in ("lora", "cache")] == ["neon, blueprint=0.6", "0.125"]
    page.locator(".tile .open").click()
    shown = page.get_by_role("dialog").locator("dl").inner_text()
    assert "LoRA\nneon, blueprint=0.6" in shown
    page.keyboard.press("Escape")
    visit.fill("a large green square", lora="neon=high")
    page.get_by_role("button", name="Generate image").click()
    assert page.locator("#lora").evaluate("field => field.validity.patternMismatch")
    assert len(visit.task_ids()) == 1, "the browser refuses what is no weight"


def choose(page: Page, data: bytes) -> None:
    page.get_by_label("Load from PNG").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": data})


def drop(page: Page, data: bytes) -> None:
    transfer = page.evaluate_handle(
        """(text) => {
          const transfer = new DataTransfer();
          const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
          transfer.items.add(new File([bytes], "a.png", { type: "image/png" }));
          return transfer;
        }""",
        base64.b64encode(data).decode(),
    )
    page.dispatch_event("body", "dragover", {"dataTransfer": transfer})
    expect(page.get_by_text("Drop a PNG file")).to_be_visible()
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    expect(page.get_by_text("Drop a PNG file")).to_be_hidden()


def test_waiting_image_shows_its_place(visit: Visit, grpc_client: Client) -> None:
    with ExitStack() as load:
        for _ in range(24):  # more than run at once
            load.enter_context(grpc_client.submit("load", steps=100, height=256, width=256))
        wait_until(lambda: any(each.waiting for each in grpc_client.gpu_load()), what="a full instance")
        visit.fill("a blue star", steps="4", priority="low")
        visit.page.locator("#generate").click()
        expect(visit.page.locator(".message")).to_have_text(re.compile(r"(Number \d+|Next) in the queue"))
    visit.wait_for_images()


def test_ranking(visit: Visit) -> None:
    page = visit.page
    page.get_by_role("tab", name="Rerank").click()
    page.get_by_role("button", name="Fill in an example").click()
    ranked = page.locator(".ranked li")
    expect(ranked).to_have_count(6)
    expect(ranked.first).to_contain_text("Paris is the capital")
    scores = [float(text) for text in page.locator(".score").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    widths = page.locator(".ranked .fill").evaluate_all("bars => bars.map((bar) => bar.offsetWidth)")
    shares = [width / page.locator(".ranked .track").first.evaluate("track => track.offsetWidth") for width in widths]
    assert shares == pytest.approx(scores, abs=0.01)
    page.get_by_label("Query").fill("Which animal barks?")
    page.get_by_label("Documents").fill("The cat sleeps.\n\nA dog guards the house.\n")
    expect(page.get_by_role("button", name="Rank 2 documents")).to_be_visible()
    page.get_by_label("Documents").press("Control+Enter")
    expect(ranked).to_have_count(2)
    expect(ranked.first).to_contain_text("A dog guards the house.")
    page.reload()
    expect(page.get_by_label("Query")).to_have_value("Which animal barks?")


def test_status_follows_the_servers(visit: Visit, grpc_client: Client, server: Server) -> None:
    page = visit.page
    page.get_by_role("tab", name="Status").click()
    flux = page.locator(".instance").filter(has_text="flux_0_0")
    expect(flux).to_contain_text("Ready")
    expect(flux.locator(".amount")).to_have_text(re.compile(r"[\d.]+ [GM]iB here, [\d.]+ GiB free of [\d.]+ GiB"))
    expect(page.locator(".server")).to_contain_text(server.grpc)
    expect(page.locator("tbody tr")).to_have_count(3)
    with grpc_client.submit("status", steps=100, height=384, width=384) as task:
        expect(page.locator("#tasks")).to_contain_text(task.id)
        expect(flux.locator("[data-of=running]")).to_have_text("1")
    expect(page.locator("#tasks")).to_have_text("Nothing is running.")


def test_everything_works_by_keyboard(visit: Visit) -> None:
    page = visit.page
    focused = "() => document.activeElement.id || document.activeElement.getAttribute('name')"

    def tab_to(name: str) -> None:
        for _ in range(30):
            if page.evaluate(focused) == name:
                return
            page.keyboard.press("Tab")
        pytest.fail(f"Tab does not reach {name}")

    tab_to("tab-images")
    tab_to("prompt")
    page.keyboard.type("a green heart")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("on a white background")
    assert visit.field("prompt") == "a green heart\non a white background"
    tab_to("count")
    page.keyboard.press("ArrowRight")
    tab_to("steps")
    page.keyboard.type("100")
    page.keyboard.press("Enter")
    expect(page.locator(".tile[data-state=running]")).to_have_count(2)
    page.keyboard.press("Escape")
    expect(page.locator(".tile[data-state=cancelled]")).to_have_count(2)
    page.locator("#steps").fill("4")
    page.locator("#prompt").press("Enter")
    visit.wait_for_images(2)
    page.keyboard.press("Shift+Tab")
    tab_to("cancel")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # opens the first image
    expect(page.get_by_role("dialog")).to_be_visible()
    title = page.locator("#viewer-settings")
    before = title.inner_text()
    page.keyboard.press("ArrowRight" if page.locator("#viewer-newer").is_disabled() else "ArrowLeft")
    assert title.inner_text() != before
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.locator("#tab-images").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tabpanel", name="Rerank")).to_be_visible()
    page.keyboard.press("End")
    expect(page.get_by_role("tabpanel", name="Status")).to_be_visible()
    page.reload()
    expect(page.get_by_role("tabpanel", name="Status")).to_be_visible()


def test_fits_a_phone(open_page: Callable[..., Visit]) -> None:
    visit = open_page(**PHONE)
    page = visit.page

    def overflow() -> int:
        return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")

    assert overflow() <= 0
    visit.fill("a red circle " + "x" * 80, count=4, steps="2")
    page.get_by_role("button", name="Generate 4 images").tap()
    visit.wait_for_images(4)
    assert overflow() <= 0
    expect(page.locator("#generate")).to_be_in_viewport()
    expect(page.locator(".tile").first).to_be_in_viewport()
    page.locator(".tile .open").first.tap()
    expect(page.get_by_role("button", name="Use these settings")).to_be_visible()
    assert overflow() <= 0
    page.get_by_role("button", name="Close").tap()
    page.get_by_role("tab", name="Rerank").tap()
    page.get_by_role("button", name="Fill in an example").tap()
    expect(page.locator(".ranked li")).to_have_count(6)
    assert overflow() <= 0
    page.get_by_role("tab", name="Status").tap()
    expect(page.locator(".instance")).to_have_count(2)
    assert overflow() <= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_and_nothing_moves_unasked(scheme: str, open_page: Callable[..., Visit]) -> None:
    visit = open_page(color_scheme=scheme, reduced_motion="reduce")
    contrasts = visit.page.evaluate(
        """() => {
          const style = getComputedStyle(document.documentElement);
          const light = (name) => {
            const digits = style.getPropertyValue(name).trim().slice(1);
            const [red, green, blue] = [0, 2, 4].map((start) => {
              const level = parseInt(digits.slice(start, start + 2), 16) / 255;
              return level <= 0.04045 ? level / 12.92 : ((level + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
          };
          const pairs = [["--ink", "--paper"], ["--ink", "--sunken"], ["--soft", "--paper"], ["--soft", "--card"],
            ["--soft", "--sunken"], ["--paper", "--ink"], ["--bad", "--bad-paper"]];
          return pairs.map((pair) => {
            const [more, less] = pair.map(light).sort((one, other) => other - one);
            return [pair.join(" on "), (more + 0.05) / (less + 0.05)];
          });
        }"""
    )
    assert [pair for pair, contrast in contrasts if not contrast >= 4.5] == []
    dark = visit.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 21, 23)"
    assert dark == (scheme == "dark")
    visit.fill("x", **LONG)
    visit.page.locator("#generate").click()
    expect(visit.page.locator(".tile[data-state=running]")).to_have_count(1)
    assert visit.page.evaluate("document.getAnimations().length") == 0
    visit.page.keyboard.press("Escape")
    expect(visit.page.locator("#run-figures")).to_have_text("Cancelled")


def test_error_is_one_sentence_with_the_requests_id(visit: Visit) -> None:
    page = visit.page
    visit.fill("too large", size="custom")
    visit.fill("too large", width="4096", height="4096")
    page.locator("#generate").click()
    error = page.locator("#image-error")
    expect(error).to_contain_text("allowed: at most 4194304 pixels. Request")
    (task_id,) = visit.task_ids()
    expect(error.locator("code")).to_have_text(task_id)
    expect(page.locator("#run")).to_be_hidden()
    assert [text for text in visit.errors if not FAILED_ANSWER.match(text)] == []
    visit.errors.clear()


def test_key_is_asked_for_and_sent(
    browser: Browser, open_page: Callable[..., Visit], server: Server, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text(f"alice {hashlib.sha256(b'right').hexdigest()}\n")
    with running_gateway(tmp_path, server.grpc, options=("--keys", str(keys))) as locked:
        visit = open_page(locked.url)
        page = visit.page
        visit.fill("a red circle", steps="2")
        page.locator("#generate").click()
        expect(page.locator("#image-error")).to_contain_text("This gateway needs an API key. Request")
        for key in ("wrong", "right"):  # The page asks by itself, also after a wrong one.
            page.get_by_label("API key").fill(key)
            page.keyboard.press("Enter")
            expect(page.get_by_role("button", name="API key set")).to_be_visible()
            page.locator("#generate").click()
            if key == "wrong":
                expect(page.locator("#image-error")).to_contain_text("The API key is not valid. Request")
        visit.wait_for_images()
        page.reload()  # The tab keeps it; another one has none.
        expect(page.get_by_role("button", name="API key set")).to_be_visible()
        assert page.evaluate("Object.values(localStorage).join().includes('right')") is False
        visit.errors[:] = [text for text in visit.errors if not FAILED_ANSWER.match(text)]
        page.goto("about:blank")
