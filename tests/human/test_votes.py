# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json
import os
import signal
import subprocess
import sys

import pytest

from tapo_trl.human.votes import VoteStore, check_event, current_votes, read_events

from .studies import vote


DIMENSIONS = ["visual_quality", "text_alignment"]


class TestStore:
    def test_a_vote_is_in_the_file_when_append_returns(self, tmp_path):
        with VoteStore(tmp_path / "votes.jsonl") as store:
            event = vote("p01", "0001")
            assert store.append(event)
            assert read_events(tmp_path / "votes.jsonl", DIMENSIONS) == [event]

    def test_an_event_sent_twice_is_there_once(self, tmp_path):
        event = vote("p01", "0001")
        with VoteStore(tmp_path / "votes.jsonl") as store:
            assert store.append(event)
            assert not store.append(event)
        with VoteStore(tmp_path / "votes.jsonl") as store:
            assert not store.append(event)
            assert store.rows == [event]

    def test_votes_on_earlier_questions_may_answer_others(self, tmp_path):
        file = tmp_path / "votes.jsonl"
        with VoteStore(file) as store:
            store.append(vote("p01", "0001", {"beauty": 1.0}, guideline="old"))
            store.append(vote("p01", "0002", guideline="new"))
        assert len(read_events(file, DIMENSIONS, "new")) == 2
        with pytest.raises(ValueError, match="line 2, is no vote"):
            read_events(file, ["beauty"], "new")
        with pytest.raises(ValueError, match="line 1, is no vote"):
            read_events(file, DIMENSIONS)

    def test_a_torn_line_is_cut_off_at_the_start(self, tmp_path):
        file = tmp_path / "votes.jsonl"
        first, second = vote("p01", "0001"), vote("p01", "0002")
        with VoteStore(file) as store:
            store.append(first)
        with file.open("a") as torn:
            torn.write('{"id": "x", "kind": "vo')
        assert read_events(file, DIMENSIONS) == [first]
        with VoteStore(file) as store:
            store.append(second)
        assert read_events(file, DIMENSIONS) == [first, second]

    def test_a_whole_last_line_without_its_end_stays(self, tmp_path):
        file, first, second = tmp_path / "votes.jsonl", vote("p01", "0001"), vote("p01", "0002")
        file.write_text(json.dumps(first))  # as an editor may leave it
        with VoteStore(file) as store:
            store.append(second)
        assert read_events(file, DIMENSIONS) == [first, second]

    def test_damage_in_the_middle_names_the_line(self, tmp_path):
        file = tmp_path / "votes.jsonl"
        with VoteStore(file) as store:
            store.append(vote("p01", "0001"))
            store.append(vote("p01", "0002"))
        lines = file.read_text().splitlines()
        file.write_text(lines[0][:20] + "\n" + lines[1] + "\n")
        with pytest.raises(ValueError, match="line 1"):
            VoteStore(file)
        with pytest.raises(ValueError, match="line 1"):
            read_events(file, DIMENSIONS)

    def test_a_second_server_is_refused_and_the_first_goes_on(self, tmp_path):
        file = tmp_path / "votes.jsonl"
        with VoteStore(file) as store:
            with pytest.raises(RuntimeError, match="in use"):
                VoteStore(file)
            assert store.append(vote("p01", "0001"))
        VoteStore(file).close()

    def test_a_full_disk_leaves_the_file_as_it_was(self, tmp_path, monkeypatch):
        file = tmp_path / "votes.jsonl"
        with VoteStore(file) as store:
            store.append(vote("p01", "0001"))
            before, write = file.read_bytes(), os.write
            monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:10]))
            event = vote("p01", "0002")
            with pytest.raises(OSError, match="disk full"):
                store.append(event)
            monkeypatch.undo()
            assert file.read_bytes() == before
            assert store.append(event)

    @pytest.mark.slow
    def test_killed_while_writing_loses_no_acknowledged_vote(self, tmp_path):
        """Each of 50 processes is killed at the vote that it is at; what it has said to be saved is saved."""
        file, acknowledged = tmp_path / "votes.jsonl", []
        script = (
            "import os, signal, sys\n"
            "from tapo_trl.human.votes import VoteStore\n"
            "from tests.human.studies import vote\n"
            "run, stop, where = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]\n"
            "store = VoteStore(sys.argv[1])\n"
            "write, sync = os.write, os.fsync\n"
            "def torn(descriptor, data):\n"
            "    write(descriptor, data[: len(data) // 2])\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            "for number in range(20):\n"
            "    if number == stop and where == 'write': os.write = torn\n"
            "    if number == stop and where == 'sync': os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    event = vote('p01', f'{number:04d}') | {'id': f'{run} {number}'}\n"
            "    store.append(event)\n"
            "    print(event['id'], flush=True)\n"
        )
        fork = (
            "import os, sys\n"
            "import tapo_trl.human.votes, tests.human.studies\n"
            "script = sys.argv[2]\n"
            "for run in range(50):\n"
            "    child = os.fork()\n"
            "    if child == 0:\n"
            "        sys.argv = ['', sys.argv[1], run, run % 20, ('write', 'sync')[run % 2]]\n"
            "        exec(script)\n"
            "        os._exit(0)\n"
            "    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9\n"
        )
        result = subprocess.run([sys.executable, "-c", fork, str(file), script], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        acknowledged = result.stdout.splitlines()
        assert len(acknowledged) == sum(run % 20 for run in range(50))
        with VoteStore(file) as store:
            ids = [event["id"] for event in store.rows]
        assert len(ids) == len(set(ids))
        assert set(acknowledged) <= set(ids)
        assert signal.SIGKILL == 9


class TestEvents:
    def test_the_last_vote_counts_and_an_undo_takes_it_back(self):
        first, second = vote("p01", "0001", 1.0), vote("p01", "0001", 0.0)
        other = vote("p02", "0001", 0.5)
        assert current_votes([first, other, second]) == [second, other]
        assert current_votes([first, other, vote("p01", "0001", kind="undo")]) == [other]

    def test_a_skip_is_no_vote(self):
        skip = vote("p01", "0001", kind="skip", reason="broken")
        assert current_votes([vote("p01", "0001"), skip]) == []
        assert current_votes([skip], ["skip"]) == [skip]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"kind": "like"}, "kind"),
            ({"id": ""}, "`id`"),
            ({"annotator": 3}, "`annotator`"),
            ({"labels": {"visual_quality": 1.0}}, "answer each"),
            ({"labels": {"visual_quality": 1.0, "text_alignment": 0.7}}, "tie"),
            ({"labels": {"visual_quality": True, "text_alignment": 0.5}}, "tie"),
            ({"kind": "skip", "reason": "boring"}, "reason"),
        ],
    )
    def test_what_cannot_be_used_is_refused(self, change, message):
        check_event(vote("p01", "0001"), DIMENSIONS)
        with pytest.raises(ValueError, match=message):
            check_event(vote("p01", "0001") | change, DIMENSIONS)
