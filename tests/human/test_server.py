# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import os
import socket
import subprocess
import sys

import pytest


pytest.importorskip("starlette", reason="the annotation page needs `pip install starlette uvicorn`")

from starlette.testclient import TestClient

from tapo_trl.cli.annotate import main as annotate
from tapo_trl.cli.human_arguments import AnnotateArguments
from tapo_trl.human.access import Access
from tapo_trl.human.assignment import left_medium
from tapo_trl.human.server import AnnotationPage
from tapo_trl.human.study import View
from tapo_trl.human.votes import VoteStore, read_events

from .studies import make_study


def client_of(page, **options):
    """A browser on the same machine."""
    return TestClient(page.app(), base_url="http://localhost:8200", **options)


class Site:
    """A study that is served, and what a browser sends."""

    def __init__(self, folder, **options):
        self.study = make_study(folder, **options)
        self.open()

    def open(self):
        self.store = VoteStore(self.study.folder / "votes.jsonl")
        self.access = Access(self.study.folder)
        self.page = AnnotationPage(self.study, self.store, self.access)
        self.client = client_of(self.page)

    def reopen(self):
        self.store.close()
        self.open()

    def pair(self):
        return self.client.get("/api/next").json()["pair"]

    def vote(self, pair_id, answer="left", id="1", **changes):
        pair_id = changes.pop("other", pair_id)
        body = {
            "id": id,
            "pair_id": pair_id,
            "answers": {"visual_quality": answer, "text_alignment": "tie"},
            "ms": 1500,
            "plays": 1,
        }
        return self.client.post("/api/vote", json=body | changes)

    def events(self):
        return read_events(self.study.folder / "votes.jsonl", self.study.dimension_names)


@pytest.fixture
def site(tmp_path):
    site = Site(tmp_path / "study")
    yield site
    site.store.close()


class TestVoting:
    def test_a_vote_is_saved_by_medium_and_the_next_pair_comes(self, site):
        pair = site.pair()
        response = site.vote(pair["pair_id"], "right")
        assert response.json()["done"] == 1
        assert response.json()["pair"]["pair_id"] != pair["pair_id"]
        event = site.events()[0]
        stored = site.page.assignment.pairs[pair["pair_id"]]
        left = left_medium(site.study.seed, "local", stored)
        assert event["labels"] == {"visual_quality": 1.0 if left == 1 else 0.0, "text_alignment": 0.5}
        assert (event["left"], event["ms"], event["annotator"], event["guideline"]) == (
            left,
            1500,
            "local",
            site.study.guideline_hash,
        )

    def test_what_is_shown_tells_nothing_of_the_source(self, site):
        response = site.client.get("/api/next")
        pair = response.json()["pair"]
        assert set(pair) == {"pair_id", "prompt", "is_video", "media", "captions", "rows"}
        text = response.text + site.client.get("/").text
        for medium in ("media/a/", "media/b/", "source_0", "source_1"):
            assert medium not in text

    def test_the_same_vote_sent_twice_is_there_once(self, site):
        pair = site.pair()
        assert site.vote(pair["pair_id"]).json() == site.vote(pair["pair_id"]).json()
        assert len(site.events()) == 1

    def test_undo_brings_the_pair_back(self, site):
        pair = site.pair()
        site.vote(pair["pair_id"])
        state = site.client.post("/api/undo", json={"id": "2"}).json()
        assert (state["done"], state["pair"]["pair_id"], state["can_undo"]) == (0, pair["pair_id"], False)
        again = site.client.post("/api/undo", json={"id": "3"})
        assert again.status_code == 404
        assert site.vote(pair["pair_id"], id="4").json()["done"] == 1
        assert [event["kind"] for event in site.events()] == ["vote", "undo", "vote"]

    def test_an_undo_sent_twice_is_done_once(self, site):
        pair = site.pair()
        site.vote(pair["pair_id"])
        first = site.client.post("/api/undo", json={"id": "2"})
        assert first.json() == site.client.post("/api/undo", json={"id": "2"}).json()
        site.reopen()
        assert first.json() == site.client.post("/api/undo", json={"id": "2"}).json()
        assert [event["kind"] for event in site.events()] == ["vote", "undo"]

    def test_skip_needs_a_known_reason(self, site):
        pair = site.pair()
        body = {"id": "1", "pair_id": pair["pair_id"]}
        assert site.client.post("/api/skip", json=body | {"reason": "boring"}).status_code == 400
        assert site.client.post("/api/skip", json=body | {"reason": "broken"}).json()["done"] == 1

    def test_a_restarted_server_goes_on(self, site):
        site.vote(site.pair()["pair_id"])
        expected = site.pair()
        site.reopen()
        assert site.pair() == expected

    def test_a_full_disk_is_said_and_the_vote_can_be_sent_again(self, site, monkeypatch):
        pair, write = site.pair(), os.write
        with monkeypatch.context() as full:
            full.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
            response = site.vote(pair["pair_id"])
        assert response.status_code == 507
        assert "disk full" in response.json()["error"]
        assert site.vote(pair["pair_id"]).json()["done"] == 1

    def test_the_end(self, site):
        for number in range(6):
            state = site.vote(site.pair()["pair_id"], id=str(number)).json()
        assert state["pair"] is None
        assert (state["done"], state["total"]) == (6, 6)


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "status"),
        [
            ({"other": "nothing"}, 404),
            ({"answers": {"visual_quality": "left"}}, 400),
            ({"answers": {"visual_quality": "best", "text_alignment": "tie"}}, 400),
            ({"answers": None}, 400),
            ({"answers": {"visual_quality": [], "text_alignment": "tie"}}, 400),
            ({"id": None}, 400),
            ({"ms": "many"}, 400),
            ({"plays": -1}, 400),
            ({"id": "x" * 20_000}, 413),
        ],
    )
    def test_a_vote_that_cannot_be_used(self, site, changes, status):
        response = site.vote(site.pair()["pair_id"], **changes)
        assert response.status_code == status
        assert response.json()["error"]
        assert site.events() == []

    def test_other_sites_cannot_send_votes(self, site):
        body = '{"id": "1", "pair_id": "0000", "answers": {}}'
        assert site.client.post("/api/vote", content=body, headers={"content-type": "text/plain"}).status_code == 415
        assert "access-control-allow-origin" not in site.client.get("/api/next").headers

    def test_no_json(self, site):
        headers = {"content-type": "application/json"}
        assert site.client.post("/api/vote", content="{", headers=headers).status_code == 400
        assert site.client.post("/api/vote", content="[]", headers=headers).status_code == 400
        assert site.client.post("/api/vote", content="[" * 16_000, headers=headers).status_code == 400

    @pytest.mark.parametrize(
        ("host", "status"),
        [
            ("localhost:8200", 200),
            ("127.0.0.1:8200", 200),
            ("[::1]:8200", 200),
            ("LocalHost", 200),
            ("Proxy.test", 200),
            ("evil.test:8200", 403),
            ("localhost.evil.test", 403),
            ("localhost@evil.test", 403),
            ("127.0.0.1.evil.test", 403),
            ("[::1", 403),
            ("", 403),
        ],
    )
    def test_a_page_without_tokens_answers_to_names_of_this_machine(self, site, host, status):
        site.access.allowed_hosts |= Access(site.study.folder, ["proxy.test"]).allowed_hosts
        medium = site.pair()["media"][0]
        for address in ("/", "/api/next", medium):
            response = site.client.get(address, headers={"host": host})
            assert response.status_code == status
            assert ("--allowed_hosts" in response.text) == (status == 403)
        body = {"id": "1", "pair_id": site.pair()["pair_id"], "reason": "broken"}
        assert site.client.post("/api/skip", json=body, headers={"host": host}).status_code == status

    def test_a_page_with_tokens_needs_no_host(self, site):
        token = site.access.add(["p01"])["p01"]
        client = TestClient(site.page.app(), base_url="http://votes.test")
        assert client.get(f"/?token={token}").status_code == 200
        assert client.get("/api/next").json()["annotator"] == "p01"

    @pytest.mark.parametrize("name", ["study.yaml", "..%2fvotes.jsonl", "%2e%2e/votes.jsonl", "0000.png"])
    def test_only_media_are_served_under_their_secret_names(self, site, name):
        assert site.client.get(f"/media/{name}").status_code == 404


class TestPeople:
    def test_each_has_a_link_and_votes_under_their_own_name(self, site):
        tokens = site.access.add(["p01", "p02"])
        assert site.client.get("/api/next").status_code == 401
        assert site.client.get("/?token=wrong").status_code == 401
        for name, token in tokens.items():
            person = client_of(site.page)
            response = person.get(f"/?token={token}")
            assert response.status_code == 200 and token not in str(response.url)
            assert "HttpOnly" in response.history[0].headers["set-cookie"]
            state = person.get("/api/next").json()
            assert (state["annotator"], state["done"]) == (name, 0)
            body = {"answers": {"visual_quality": "left", "text_alignment": "left"}, "ms": 1, "plays": 0}
            person.post(
                "/api/vote", json=body | {"id": name, "pair_id": state["pair"]["pair_id"], "annotator": "other"}
            )
        assert [event["annotator"] for event in site.events()] == ["p01", "p02"]
        assert person.cookies.get(site.access.cookie) == tokens["p02"]

    def test_two_studies_on_one_machine_know_a_browser_at_once(self, tmp_path):
        sites = [Site(tmp_path / name) for name in ("first", "second")]
        browser = client_of(sites[0].page)
        for site in sites:
            other = client_of(site.page, cookies=browser.cookies)
            other.get(f"/?token={site.access.add(['p01'])['p01']}")
            browser.cookies.update(other.cookies)
        for site in sites:
            page = client_of(site.page, cookies=browser.cookies)
            assert page.get("/api/next").json()["annotator"] == "p01"
            site.store.close()

    def test_tokens_are_hashed_and_their_file_is_private(self, site):
        token = site.access.add(["p01"])["p01"]
        file = site.study.folder / "tokens.json"
        assert token not in file.read_text()
        assert file.stat().st_mode & 0o777 == 0o600
        again = Access(site.study.folder)
        assert again.add(["p01"]) == {}
        assert again.annotator_of(token) == "p01"
        with pytest.raises(ValueError, match="all people in results"):
            site.access.add(["all"])
        with pytest.raises(ValueError, match="no name"):
            again.add(["p 01"])


class TestMedia:
    @pytest.mark.parametrize("view", [None, View(16, 24, 4, 8)])
    def test_parts_of_a_video(self, tmp_path, view):
        site = Site(tmp_path / "study", num_pairs=1, videos=True, view=view)
        address = site.pair()["media"][0]
        whole = site.client.get(address)
        assert whole.headers["content-type"] == "video/mp4"
        part = site.client.get(address, headers={"range": "bytes=10-19"})
        assert part.status_code == 206
        assert part.content == whole.content[10:20]
        cut = list((site.study.folder / "view").rglob("*.mp4")) if view else []
        assert len(cut) == (1 if view else 0)
        site.store.close()

    def test_a_missing_file_is_404(self, site):
        pair = site.pair()
        for medium in site.page.assignment.pairs[pair["pair_id"]].media:
            (site.study.folder / medium).unlink()
        assert site.client.get(pair["media"][0]).status_code == 404

    def test_a_file_that_cannot_be_cut_is_404_and_others_are_shown(self, tmp_path):
        site = Site(tmp_path / "study", num_pairs=1, videos=True, view=View(16, 24, 4, 8))
        pair = site.pair()
        shown = site.page.assignment.pairs[pair["pair_id"]]
        left = left_medium(site.study.seed, "local", shown)
        (site.study.folder / shown.media[left]).write_bytes(b"no video")
        assert [site.client.get(address).status_code for address in pair["media"]] == [404, 200]
        site.store.close()


class TestCommand:
    def test_a_second_server_says_so_and_gives_out_no_links(self, site):
        with pytest.raises(SystemExit, match="in use by another process"):
            annotate(AnnotateArguments(folder=str(site.study.folder), annotators=["p01"]))
        assert "p01" not in Access(site.study.folder).hashes

    def test_a_port_in_use_gives_out_no_links(self, tmp_path):
        study = make_study(tmp_path, 1)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(SystemExit, match="in use"):
                annotate(AnnotateArguments(folder=str(tmp_path), annotators=["p01"], port=port))
        assert "p01" not in Access(study.folder).hashes

    def test_others_need_links(self, tmp_path):
        make_study(tmp_path, 1)
        with pytest.raises(SystemExit, match="name `annotators`"):
            annotate(AnnotateArguments(folder=str(tmp_path), host="0.0.0.0"))

    def test_hosts_have_no_effect_where_people_have_links(self, tmp_path):
        make_study(tmp_path, 1)
        with pytest.raises(ValueError, match="`allowed_hosts` is for a page without links"):
            AnnotateArguments(folder=str(tmp_path), annotators=["p01"], allowed_hosts=["proxy.test"])
        Access(tmp_path).add(["p01"])
        with pytest.raises(SystemExit, match="`allowed_hosts` has no effect: the people in .*tokens.json have links"):
            annotate(AnnotateArguments(folder=str(tmp_path), allowed_hosts=["proxy.test"]))

    def test_starts_without_the_libraries_of_models(self, tmp_path):
        code = (
            "import sys, tapo_trl.human.server, tapo_trl.cli.annotate as cli\n"
            "cli.make_parser().parse_args_and_config(['study'])\n"
            "print([name for name in ('diffusers', 'peft', 'accelerate') if name in sys.modules])"
        )
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert output == "[]\n"

    def test_damaged_tokens(self, tmp_path):
        make_study(tmp_path, 1)
        (tmp_path / "tokens.json").write_text("{")
        with pytest.raises(SystemExit, match="tokens.json is damaged"):
            annotate(AnnotateArguments(folder=str(tmp_path)))
