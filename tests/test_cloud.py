"""Claims of `envs/cloud.py`, on a short recording of the mock itself."""

import itertools
import json
import sys

import pytest

from envs import cloud, records


def recorded(folder, name, *argv):
    out = folder / name
    assert cloud.main(["--episodes", "4", "--out", str(out), *argv]) == 0
    return out


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Four episodes with seed 0."""
    pytest.importorskip("moto")
    return recorded(tmp_path_factory.mktemp("cloud"), "a.jsonl.gz")


def without_reply(text):
    return {key: value for key, value in json.loads(text).items() if key != "reply"}


def test_the_same_seed_gives_the_same_bytes(file, tmp_path):
    assert recorded(tmp_path, "b.jsonl.gz").read_bytes() == file.read_bytes()


def test_another_seed_gives_other_episodes(file, tmp_path):
    assert recorded(tmp_path, "c.jsonl.gz", "--seed", "1").read_bytes() != file.read_bytes()


def test_the_seed_of_a_run_splits_the_file(file):
    transitions = records.read(file)
    assert len({tr.episode for tr in transitions}) == 4
    assert all(records.split(transitions, 0).values())


def test_y_is_the_next_x(file):
    for _, steps in itertools.groupby(records.read(file), key=lambda tr: tr.episode):
        steps = list(steps)
        assert 8 <= len(steps) <= 12 and [tr.t for tr in steps] == list(range(len(steps)))
        assert all(tr.y == later.x for tr, later in zip(steps, steps[1:]))


def test_states_are_json_of_5_to_40_lines(file):
    for tr in records.read(file):
        for state in (tr.x, tr.y):
            assert 5 <= len(state.splitlines()) <= 40
            assert state == json.dumps(json.loads(state), indent=2, sort_keys=True)


def test_a_failed_call_changes_only_the_reply(file):
    failed = [tr for tr in records.read(file) if "Code" in json.loads(tr.y)["reply"]]
    assert failed
    for tr in failed:
        assert json.loads(tr.y)["reply"]["status"] >= 400
        assert without_reply(tr.x) == without_reply(tr.y)


@pytest.fixture
def account():
    """A fresh account of the mock with the bucket media."""
    moto, boto3 = pytest.importorskip("moto"), pytest.importorskip("boto3")
    with moto.mock_aws():
        account = cloud.Account(boto3)
        account.call("create_bucket", {"Bucket": "media"})
        account.call("put_object", {"Bucket": "media", "Key": "a.txt", "Body": "hello"})
        yield account


@pytest.mark.parametrize("name, given, reply", [
    ("get_object", {"Bucket": "media", "Key": "a.txt"}, {"Body": "hello", "status": 200}),
    ("get_object", {"Bucket": "media", "Key": "no"},
     {"Code": "NoSuchKey", "Key": "no", "status": 404}),
    ("delete_bucket", {"Bucket": "media"},
     {"BucketName": "media", "Code": "BucketNotEmpty", "status": 409}),
    ("delete_bucket", {"Bucket": "no"},
     {"BucketName": "no", "Code": "NoSuchBucket", "status": 404}),
    ("delete_object", {"Bucket": "media", "Key": "no"}, {"status": 204}),
])
def test_replies(account, name, given, reply):
    account.call(name, given)
    assert account.reply == reply


def test_a_call_as_text(account):
    given = {"Bucket": "media", "Tagging": {"TagSet": [{"Key": "team", "Value": "red"}]}}
    assert account.call("put_bucket_tagging", given) == (
        'put_bucket_tagging Bucket=media Tagging={"TagSet": [{"Key": "team", "Value": "red"}]}')


def test_a_new_bucket_has_no_tags_of_an_old_one(account):
    for name, given in [
        ("put_bucket_tagging", {"Tagging": {"TagSet": [{"Key": "team", "Value": "red"}]}}),
        ("delete_object", {"Key": "a.txt"}),
        ("delete_bucket", {}),
        ("create_bucket", {}),
    ]:
        account.call(name, {"Bucket": "media", **given})
    assert account.state() == {
        "buckets": ["media"], "items": {}, "objects": {}, "reply": {"status": 200}, "tags": {}}


def test_a_missing_package_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(SystemExit) as caught:
        cloud.main(["--out", str(tmp_path / "d.jsonl.gz")])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    assert 'pip install "moto[s3,dynamodb]"' in error and not list(tmp_path.iterdir())
