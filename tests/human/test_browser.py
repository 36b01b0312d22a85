# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
The annotation page in Chromium. `make test-browser` runs this. With the environment variable SCREENSHOTS, a folder, pictures of the page
are kept there: `annotate_clips.png` and `annotate_clips_phone.png` are those of docs/assets.
"""

import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tapo_trl.data.videos import write_video
from tapo_trl.human.live import HumanReward
from tapo_trl.human.study import Pair, Study, View
from tapo_trl.human.votes import read_events

from .studies import make_study


pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[2]
SCREENSHOTS = os.environ.get("SCREENSHOTS")


class Server:
    """`tapo-trl annotate` in a process of its own."""

    def __init__(self, folder: Path, port: int = 0, *flags: str):
        command = [sys.executable, "-m", "tapo_trl.cli", "annotate", str(folder), "--port", str(port), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.links = {}
        for line in self.process.stdout:  # ends when the address is printed, or the process ends
            if "?token=" in line:
                name, link = line.strip().split(": ", 1)
                self.links[name] = link
            if "Ctrl+C" in line:
                self.address = line.split(": ")[-1].split(" ")[0]
                break
        else:
            raise AssertionError(f"The server ended with {self.process.wait()}")
        self.port = int(self.address.rstrip("/").rsplit(":", 1)[1])

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium (Debian's package chromium)")
    with playwright.sync_playwright() as running:
        options = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        browser = running.chromium.launch(executable_path=chromium, args=options)
        yield browser
        browser.close()


@pytest.fixture
def servers(tmp_path):
    """Starts servers, and ends them however the test ends."""
    started = []

    def start(*args, **kwargs):
        started.append(Server(*args, **kwargs))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.kill()


def open_page(browser, address, **options):
    """A page of a new person, and the requests that it made."""
    # The page forbids eval, with which Playwright waits for a condition
    context = browser.new_context(viewport={"width": 1200, "height": 860}, bypass_csp=True, **options)
    page = context.new_page()
    page.requests = []
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(address)
    return page


def count(page, text):
    from playwright.sync_api import expect

    expect(page.locator("#count")).to_have_text(text)


def shoot(page, name):
    if SCREENSHOTS:
        Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{SCREENSHOTS}/{name}.png")


def test_voting_by_keys_survives_reload_kill_and_retry(browser, servers, tmp_path):
    from playwright.sync_api import expect

    study = make_study(tmp_path / "study", 3, videos=True, view=View(32, 32, 8, 8))
    server = servers(study.folder)
    page = open_page(browser, server.address)
    count(page, "0 / 3")
    # Both clips play
    playing = (
        "[...document.querySelectorAll('video')].every((v) => v.readyState >= 3 && !v.paused && v.currentTime > 0)"
    )
    page.wait_for_function(f"document.querySelectorAll('video').length === 2 && {playing}")
    shoot(page, "annotate")

    # One of two answers, then a reload: the draft and the current row are back
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".row").nth(0).locator("[aria-pressed=true]")).to_have_text("Left")
    expect(page.locator("#next")).to_be_disabled()
    page.keyboard.press("Enter")
    page.reload()
    expect(page.locator(".row").nth(0).locator("[aria-pressed=true]")).to_have_text("Left")
    expect(page.locator(".row.current")).to_have_text("Which shows the text better?LeftTieRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    count(page, "1 / 3")

    # The server dies: the answers stay, and Next sends the same vote again
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    server.kill()
    page.keyboard.press("Enter")
    expect(page.locator("#message")).to_contain_text("Not saved")
    shoot(page, "annotate_not_saved")
    servers(study.folder, server.port)
    page.keyboard.press("Enter")
    count(page, "2 / 3")

    # Undo, and the other answer
    page.keyboard.press("u")
    count(page, "1 / 3")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    count(page, "2 / 3")
    page.click("#skip")
    page.click("text=cannot judge")
    expect(page.locator("#finished")).to_be_visible()

    events = read_events(study.folder / "votes.jsonl", study.dimension_names)
    assert [event["kind"] for event in events] == ["vote", "vote", "undo", "vote", "skip"]
    first, second, _, again, _ = events
    better = {0: 1.0, 1: 0.0}  # label of a vote for the left one, by the medium that is on the left
    assert first["labels"] == {"visual_quality": better[first["left"]], "text_alignment": 0.5}
    assert second["labels"] == dict.fromkeys(study.dimension_names, 1 - better[second["left"]])
    assert again["labels"] == dict.fromkeys(study.dimension_names, better[again["left"]])
    assert all(url.startswith((server.address, "data:")) for url in page.requests), page.requests


def test_media_that_the_server_did_not_send_are_loaded_once_it_answers_again(browser, servers, tmp_path):
    from playwright.sync_api import expect

    study = make_study(tmp_path / "study", 2, videos=True)
    server = servers(study.folder)
    page = open_page(browser, server.address)
    count(page, "0 / 2")
    page.wait_for_function("[...document.querySelectorAll('video')].every((v) => v.readyState >= 3)")

    page.route("**/media/*", lambda route: route.abort())  # of the next pair, no clip comes
    for _ in range(2):
        page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    count(page, "1 / 2")
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    server.kill()
    page.keyboard.press("Enter")
    expect(page.locator("#message")).to_contain_text("Not saved")
    expect(page.locator("#unshown")).to_contain_text('"Left", "Right" cannot be shown. The server does not answer')
    expect(page.locator("#message")).to_contain_text("Not saved")
    shoot(page, "annotate_not_shown")

    page.unroute("**/media/*")
    servers(study.folder, server.port)
    expect(page.locator("#unshown")).to_be_hidden(timeout=20_000)
    page.wait_for_function("[...document.querySelectorAll('video')].every((v) => v.readyState >= 3 && !v.paused)")
    expect(page.locator("#message")).to_contain_text("Not saved")  # until Next is pressed
    page.keyboard.press("Enter")
    expect(page.locator("#finished")).to_be_visible()
    first, second = read_events(study.folder / "votes.jsonl", study.dimension_names)
    for event, left in ((first, True), (second, False)):
        better = 1.0 if (event["left"] == 0) == left else 0.0
        assert event["labels"] == dict.fromkeys(study.dimension_names, better)


def test_two_studies_at_one_address_have_drafts_of_their_own(browser, servers, tmp_path):
    from playwright.sync_api import expect

    server = servers(make_study(tmp_path / "first", 1).folder)
    page = open_page(browser, server.address)
    count(page, "0 / 1")
    page.keyboard.press("ArrowLeft")
    page.reload()
    expect(page.locator("[aria-pressed=true]")).to_have_text("Left")
    server.kill()
    servers(make_study(tmp_path / "second", 1).folder, server.port)
    page.reload()
    count(page, "0 / 1")
    expect(page.locator("[aria-pressed=true]")).to_have_count(0)


def test_a_link_on_another_site_opens_the_page(browser, servers, tmp_path):
    server = servers(make_study(tmp_path / "study", 1).folder, 0, "--annotators", "p01")
    page = browser.new_context().new_page()
    mail = f'<a href="{server.links["p01"]}">vote</a>'
    page.route("http://mail.test/", lambda route: route.fulfill(body=mail, content_type="text/html"))
    page.goto("http://mail.test/")
    page.click("text=vote")
    count(page, "0 / 1")


def test_an_answer_that_changes_after_a_lost_response_counts(browser, servers, tmp_path):
    from playwright.sync_api import expect

    study = make_study(tmp_path / "study", 1)
    page = open_page(browser, servers(study.folder).address)
    count(page, "0 / 1")

    def lose(route):
        route.fetch()  # the server takes it
        route.abort()

    page.route("**/api/vote", lose, times=1)
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    expect(page.locator("#message")).to_contain_text("Not saved")
    page.locator(".row").nth(0).get_by_text("Tie").click()
    page.keyboard.press("Enter")
    count(page, "1 / 1")
    events = read_events(study.folder / "votes.jsonl", study.dimension_names)
    assert [event["labels"]["visual_quality"] == 0.5 for event in events] == [False, True]


def test_live_page_goes_on_after_the_server_is_restarted(browser, servers, tmp_path):
    from playwright.sync_api import expect

    reward = HumanReward(tmp_path)
    server = servers(tmp_path)
    page = open_page(browser, server.address)
    expect(page.locator("#finished")).to_contain_text("Waiting")
    server.kill()
    expect(page.locator("#lost")).to_contain_text("does not answer")
    servers(tmp_path, server.port)
    reward._offer(torch.rand(2, 3, 16, 16), "a prompt")
    expect(page.locator("#prompt")).to_have_text("a prompt", timeout=10_000)
    expect(page.locator("#lost")).to_be_hidden()


def test_two_people_at_once_see_and_vote_for_themselves(browser, servers, tmp_path):
    study = make_study(tmp_path / "study", 4, guidelines="Take your time.")
    server = servers(study.folder, 0, "--annotators", "p01", "p02")
    assert set(server.links) == {"p01", "p02"}
    pages = {name: open_page(browser, link) for name, link in server.links.items()}
    for page in pages.values():
        page.click("#guidelines .main")  # shown once, at the start
    for _ in range(4):
        for page in pages.values():
            for key in ("ArrowLeft", "ArrowLeft", "Enter"):
                page.keyboard.press(key)
            page.wait_for_function("state.pair === null || Object.keys(draft.answers).length === 0")
    for page in pages.values():
        count(page, "4 / 4")
        assert "token" not in page.url
    events = read_events(study.folder / "votes.jsonl", study.dimension_names)
    assert sorted(event["annotator"] for event in events) == ["p01"] * 4 + ["p02"] * 4
    stranger = open_page(browser, server.address)
    assert "does not know you" in stranger.content()


def test_phone_and_dark(browser, servers, tmp_path):
    study = make_study(tmp_path / "study", 2)
    server = servers(study.folder)
    page = open_page(browser, server.address, color_scheme="dark")
    count(page, "0 / 2")
    shoot(page, "annotate_dark")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(24, 24, 27)"
    page.set_viewport_size({"width": 390, "height": 844})
    shoot(page, "annotate_phone")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")  # all of it without scrolling
    for row in range(2):
        page.locator(".row").nth(row).locator("text=Tie").click()
    page.click("#next")
    count(page, "1 / 2")


def moving_emoji_study(folder):
    """Clean clips against those with a fault, of the moving-emoji world, enlarged."""
    clips = runpy.run_path(str(ROOT / "examples/moving_emoji/clips.py"))
    study = Study(title="Moving emoji")
    study.save(folder)
    pairs, rng = [], random.Random(0)
    for number, (subject, kind) in enumerate((("panda face", "jerky"), ("penguin", "distorted"))):
        media = []
        for source in ("clean", kind):
            frames = clips["draw_clip"](clips["load_subjects"]()[subject], "left", source, rng)
            video = F.interpolate(torch.from_numpy(frames).movedim(-1, 1) / 255, scale_factor=6, mode="bicubic")
            medium = folder / "media" / source / f"{number}.mp4"
            medium.parent.mkdir(parents=True, exist_ok=True)
            write_video(medium, video.clamp(0, 1).transpose(0, 1), clips["FPS"])
            media.append(str(medium.relative_to(folder)))
        pairs.append(Pair(f"{number}", f"{number}", f"a {subject} moving left", *media, "clean", "faulty"))
    study.write_pairs(pairs)
    return study


def test_three_questions_on_clips_need_no_scrolling(browser, servers, tmp_path):
    server = servers(moving_emoji_study(tmp_path / "study").folder)
    page = open_page(browser, server.address)
    for name, width, height in (("annotate_clips", 1200, 860), ("annotate_clips_phone", 390, 844)):
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_function("[...document.querySelectorAll('video')].every((v) => v.currentTime > 0.4)")
        if name == "annotate_clips":
            page.keyboard.press("ArrowLeft")
        shoot(page, name)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")


def test_a_prompt_and_a_question_are_text(browser, servers, tmp_path):
    study = make_study(tmp_path / "study", 1)
    pair = study.read_pairs()[0]
    study.write_pairs([type(pair)(**{**vars(pair), "prompt": "<img src=x onerror=window.hacked=1> & more"})])
    page = open_page(browser, servers(study.folder).address)
    count(page, "0 / 1")
    assert page.text_content("#prompt") == "<img src=x onerror=window.hacked=1> & more"
    assert page.evaluate("window.hacked") is None


def test_a_file_that_cannot_be_shown_says_what_to_do(browser, servers, tmp_path):
    from playwright.sync_api import expect

    study = make_study(tmp_path / "study", 1)
    for medium in study.read_pairs()[0].media:
        (study.folder / medium).write_bytes(b"no picture")
    page = open_page(browser, servers(study.folder).address)
    expect(page.locator("#unshown")).to_contain_text('"Left", "Right" cannot be shown. Skip this pair')
    page.click("#skip")
    page.click("#reason_buttons >> text=broken")
    expect(page.locator("#finished")).to_be_visible()
