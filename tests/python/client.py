"""A client made from the .proto files alone: every Storage call, health and reflection.

Called as `client.py STUBS ADDRESS...` where STUBS holds the generated modules and the addresses are those
of all nodes. Ends with `ok N checks`; any failed check is a traceback.
"""

import sys
import uuid

sys.path.insert(0, sys.argv[1])

import grpc  # noqa: E402
from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: E402
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc  # noqa: E402
from shardfs.v1 import common_pb2, files_pb2, files_pb2_grpc, storage_pb2, storage_pb2_grpc  # noqa: E402

LIMIT = 4 << 20
OPTIONS = [("grpc.max_receive_message_length", 20 << 20), ("grpc.max_send_message_length", 64 << 20)]
# Every reserve of sensible time: a hung call fails the test.
DEADLINE = 60

checks = 0


def check(holds, *what):
    global checks
    checks += 1
    assert holds, what


class Node:
    def __init__(self, address):
        self.channel = grpc.insecure_channel(address, options=OPTIONS)
        self.storage = storage_pb2_grpc.StorageStub(self.channel)
        self.files = files_pb2_grpc.FilesStub(self.channel)


nodes = [Node(address) for address in sys.argv[2:]]
ME = (("shardfs-client-id", "python"),)


def detail_of(error):
    """The ErrorDetail in the trailer `grpc-status-details-bin`: one Any inside a google.rpc.Status."""
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-status-details-bin":
            # google.rpc.Status { int32 code = 1; string message = 2; repeated Any details = 3; }
            # Any { string type_url = 1; bytes value = 2; }: read by hand, to need no further .proto.
            any_bytes = fields(value)[3][0]
            packed = fields(any_bytes)
            check(packed[1][0].endswith(b"/shardfs.v1.ErrorDetail"), packed[1])
            return common_pb2.ErrorDetail.FromString(packed[2][0])
    raise AssertionError(f"no detail in {error}")


def fields(message):
    """Fields of a protobuf message without its schema: number -> values."""
    found, at = {}, 0

    def varint():
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        tag = varint()
        if tag & 7 == 0:
            value = varint()
        else:
            assert tag & 7 == 2, tag
            length = varint()
            value, at = message[at : at + length], at + length
        found.setdefault(tag >> 3, []).append(value)
    return found


def fails(code, reason, call):
    try:
        answer = call()
        if not hasattr(answer, "DESCRIPTOR"):
            list(answer)
    except grpc.RpcError as error:
        check(error.code() == code, error.code(), code, error.details())
        detail = detail_of(error)
        check(detail.reason == getattr(common_pb2, "ERROR_REASON_" + reason), detail)
        check(detail.message == error.details() and detail.message, detail, error.details())
        return detail
    raise AssertionError(f"should have failed with {reason}")


def primary(shard):
    """The node that serves a shard: asked of each until one does not point elsewhere."""
    for node in nodes:
        try:
            node.storage.Get(
                storage_pb2.GetRequest(shard=by_id(shard.id), key=b"absent"), metadata=ME, timeout=DEADLINE
            )
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.NOT_FOUND:
                return node
            detail = detail_of(error)
            check(error.code() == grpc.StatusCode.UNAVAILABLE, error.code())
            check(detail.reason == common_pb2.ERROR_REASON_NOT_PRIMARY and detail.retryable, detail)
            check(detail.location.node_id and detail.location.endpoints and detail.location.volume_id, detail)
    raise AssertionError("no node serves the shard")


def by_id(number):
    return common_pb2.ShardSelector(id=number)


any_node = nodes[0]

# Health and reflection need no client id.
for node in nodes:
    health = health_pb2_grpc.HealthStub(node.channel)
    for service in ("", "shardfs.v1.Storage"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE)
        check(answer.status == health_pb2.HealthCheckResponse.SERVING, service, answer)
    # grpcio's stubs speak v1alpha; servers of today speak v1, the same messages under another name.
    list_services = node.channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    ask = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="shardfs.v1.Storage"),
    ]
    services, symbol = list(list_services(iter(ask), timeout=DEADLINE))
    names = {s.name for s in services.list_services_response.service}
    check({"shardfs.v1.Storage", "shardfs.v1.Files", "shardfs.v1.Admin"} <= names, names)
    check(symbol.file_descriptor_response.file_descriptor_proto, symbol)

# No client id, a bad one.
fails(
    grpc.StatusCode.UNAUTHENTICATED,
    "NO_CLIENT_ID",
    lambda: any_node.storage.ListShards(storage_pb2.ListShardsRequest(), timeout=DEADLINE),
)

# Shards.
request_id = uuid.uuid4().hex
new = storage_pb2.NewShardRequest(name="python", request_id=request_id, mode=0o750)
shard = any_node.storage.NewShard(new, metadata=ME, timeout=DEADLINE)
check(shard.id > 0 and shard.name == "python" and shard.owner == "python", shard)
check(shard.state == common_pb2.SHARD_STATE_ACTIVE, shard)
check(any_node.storage.NewShard(new, metadata=ME, timeout=DEADLINE).id == shard.id, "request_id makes it repeatable")
fails(
    grpc.StatusCode.ALREADY_EXISTS,
    "SHARD_EXISTS",
    lambda: any_node.storage.NewShard(storage_pb2.NewShardRequest(name="python"), metadata=ME, timeout=DEADLINE),
)
for bad in ("", "a/b", "..", ".shardfs", "x" * 256):
    reason = "NAME_TOO_LONG" if len(bad) > 255 else "INVALID_ARGUMENT"
    fails(
        grpc.StatusCode.INVALID_ARGUMENT,
        reason,
        lambda: any_node.storage.NewShard(storage_pb2.NewShardRequest(name=bad), metadata=ME, timeout=DEADLINE),
    )
listed = list(any_node.storage.ListShards(storage_pb2.ListShardsRequest(), metadata=ME, timeout=DEADLINE))
check([s.name for s in listed] == ["python"], listed)

node = primary(shard)
storage = node.storage
where = by_id(shard.id)
seen = storage.GetShard(storage_pb2.GetShardRequest(shard=where), metadata=ME, timeout=DEADLINE)
check(seen.HasField("used_bytes") and seen.location.endpoints, seen)


def put(key, value, **more):
    request = storage_pb2.PutRequest(shard=where, key=key, value=value, **more)
    return storage.Put(request, metadata=ME, timeout=DEADLINE)


def get(key, **more):
    return storage.Get(storage_pb2.GetRequest(shard=where, key=key, **more), metadata=ME, timeout=DEADLINE)


# Put, Get.
meta = put(b"a/b/c", b"value").meta
check(meta.attr.size == 5 and meta.attr.kind == common_pb2.FILE_KIND_REGULAR and meta.attr.mode == 0o644, meta)
answer = get(b"a/b/c")
check(answer.value == b"value" and answer.meta == meta, answer)
check(get(b"a/b/c", offset=1, length=3).value == b"alu")
check(get(b"a/b/c", offset=100).value == b"")
check(get(b"a/b/c", meta_only=True).value == b"")
by_name = common_pb2.ShardSelector(name="python")
answer = storage.Get(storage_pb2.GetRequest(shard=by_name, key=b"a/b/c"), metadata=ME, timeout=DEADLINE)
check(answer.value == b"value")
put(b"\xff\xfe/\x80", b"bytes")
check(get(b"\xff\xfe/\x80").value == b"bytes")
options = storage_pb2.PutOptions(
    mode=0o600,
    uid=3,
    gid=4,
    mtime=common_pb2.Time(seconds=-5, nanos=7),
    indexes=[
        storage_pb2.Index(name="n", value=storage_pb2.IndexValue(integer=-3)),
        storage_pb2.Index(name="t", value=storage_pb2.IndexValue(text="x")),
    ],
)
meta = put(b"with-options", b"", options=options, durability=common_pb2.DURABILITY_BUFFERED).meta
check((meta.attr.mode, meta.attr.uid, meta.attr.gid) == (0o600, 3, 4), meta)
check((meta.attr.mtime.seconds, meta.attr.mtime.nanos) == (-5, 7), meta)
check([i.name for i in meta.indexes] == ["n", "t"], meta)
check(len(get(b"with-options").meta.indexes) == 2)

NF, IA, FP, RE, AB = (
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
)
detail = fails(NF, "NOT_FOUND", lambda: get(b"nothing"))
check(detail.shard_id == shard.id and not detail.retryable, detail)
fails(FP, "IS_DIRECTORY", lambda: put(b"a/b", b""))
fails(FP, "NOT_DIRECTORY", lambda: put(b"a/b/c/d", b""))
for bad in (b"", b"/a", b"a/", b"a//b", b"a/../b", b".", b"a\0b"):
    fails(IA, "INVALID_ARGUMENT", lambda: put(bad, b""))
    fails(IA, "INVALID_ARGUMENT", lambda: get(bad))
fails(IA, "NAME_TOO_LONG", lambda: put(b"x" * 256, b""))
fails(IA, "NAME_TOO_LONG", lambda: put(b"x/" * 2048 + b"x", b""))
fails(AB, "VERSION_MISMATCH", lambda: put(b"a/b/c", b"", options=storage_pb2.PutOptions(if_version=1 << 60)))
fails(AB, "VERSION_MISMATCH", lambda: get(b"a/b/c", if_version=1 << 60))
fails(
    grpc.StatusCode.ALREADY_EXISTS,
    "ALREADY_EXISTS",
    lambda: put(b"a/b/c", b"", options=storage_pb2.PutOptions(if_absent=True)),
)
fails(IA, "INVALID_ARGUMENT", lambda: storage.Get(storage_pb2.GetRequest(key=b"k"), metadata=ME, timeout=DEADLINE))

# Sizes.
full = bytes(range(256)) * (LIMIT // 256)
put(b"full", full)
check(get(b"full").value == full)
fails(IA, "TOO_LARGE", lambda: put(b"over", full + b"x"))
try:
    put(b"over", full * 8)
    raise AssertionError("32 MiB in one message")
except grpc.RpcError as error:
    check(error.code() in (grpc.StatusCode.OUT_OF_RANGE, RE, IA), error.code(), error.details())
check(get(b"full", length=3).value == full[:3], "the connection lives on")


# Streamed put, ranged get.
def stream(key, pieces, **more):
    yield storage_pb2.PutStreamRequest(header=storage_pb2.PutStreamHeader(shard=where, key=key, **more))
    for piece in pieces:
        yield storage_pb2.PutStreamRequest(data=piece)


pieces = [bytes([n]) * (1 << 20) for n in range(12)]
meta = storage.PutStream(stream(b"streamed", pieces, size=12 << 20), metadata=ME, timeout=DEADLINE).meta
check(meta.attr.size == 12 << 20, meta)
fails(IA, "TOO_LARGE", lambda: get(b"streamed"))
for n, piece in enumerate(pieces):
    check(get(b"streamed", offset=n << 20, length=1 << 20, if_version=meta.attr.version).value == piece, n)
for bad in (
    lambda: storage.PutStream(stream(b"short", pieces[:1], size=5), metadata=ME, timeout=DEADLINE),
    lambda: storage.PutStream(iter([storage_pb2.PutStreamRequest(data=b"x")]), metadata=ME, timeout=DEADLINE),
    lambda: storage.PutStream(iter([]), metadata=ME, timeout=DEADLINE),
):
    fails(IA, "INVALID_ARGUMENT", bad)
fails(NF, "NOT_FOUND", lambda: get(b"short"))


# Batches.
def item(key, value):
    return storage_pb2.PutItem(key=key, value=value)


def batch(items, **more):
    request = storage_pb2.BatchPutRequest(shard=where, items=items, **more)
    return storage.BatchPut(request, metadata=ME, timeout=DEADLINE)


results = batch([item(b"batch/%d" % n, b"%d" % n) for n in range(1000)]).results
check(len(results) == 1000 and all(r.WhichOneof("outcome") == "meta" for r in results))
results = batch([item(b"x", b""), item(b"a/b", b""), item(b"z", b"")]).results
check([r.WhichOneof("outcome") for r in results] == ["meta", "error", "meta"], results)
check(results[1].error.reason == common_pb2.ERROR_REASON_IS_DIRECTORY, results[1])
# A malformed item fails for itself; of an atomic batch nothing is applied.
results = batch([item(b"x", b""), item(b"../y", b"")]).results
check([r.WhichOneof("outcome") for r in results] == ["meta", "error"], results)
check(results[1].error.reason == common_pb2.ERROR_REASON_INVALID_ARGUMENT, results[1])
fails(IA, "INVALID_ARGUMENT", lambda: batch([item(b"new", b""), item(b"../y", b"")], atomic=True))
fails(NF, "NOT_FOUND", lambda: get(b"new"))
fails(FP, "IS_DIRECTORY", lambda: batch([item(b"new", b""), item(b"a/b", b"")], atomic=True))
fails(NF, "NOT_FOUND", lambda: get(b"new"))
keys = [b"batch/%d" % n for n in range(0, 1100)]
request = storage_pb2.BatchGetRequest(shard=where, keys=keys)
answers = list(storage.BatchGet(request, metadata=ME, timeout=DEADLINE))
check([a.index for a in answers] == list(range(1100)))
check(all(a.found.value == b"%d" % a.index for a in answers[:1000]))
check(all(a.error.reason == common_pb2.ERROR_REASON_NOT_FOUND for a in answers[1000:]))
fails(IA, "TOO_LARGE", lambda: batch([item(b"t/%d" % n, b"") for n in range(16_385)]))


# List.
def listing(**more):
    request = storage_pb2.ListRequest(shard=where, **more)
    entries = []
    for reply in storage.List(request, metadata=ME, timeout=DEADLINE):
        entries += [e.key or e.common_prefix + b"*" for e in reply.entries]
    return entries


everything = listing()
check(everything == sorted(everything) and len(everything) == 1007, len(everything), everything[:10])
check(listing(prefix=b"batch/99") == [b"batch/99"] + [b"batch/99%d" % n for n in range(10)])
check(listing(delimiter=b"/", limit=3) == [b"a/*", b"batch/*", b"full"], listing(delimiter=b"/", limit=3))
check(listing(start_after=b"streamed") == [b"with-options", b"x", b"z", b"\xff\xfe/\x80"])
check(listing(prefix=b"a", include_directories=True) == [b"a/", b"a/b/", b"a/b/c"])
entry = next(iter(storage.List(storage_pb2.ListRequest(shard=where, prefix=b"full"), metadata=ME))).entries[0]
check(entry.meta.attr.size == LIMIT and entry.kind == common_pb2.FILE_KIND_REGULAR, entry)

# Delete, exactly once.
session = node.files.OpenSession(
    files_pb2.OpenSessionRequest(header=files_pb2.CallHeader(shard_id=shard.id), label="python"),
    metadata=ME,
    timeout=DEADLINE,
)
request = storage_pb2.DeleteRequest(
    shard=where, key=b"a/b/c", write_id=common_pb2.WriteId(session_id=session.session_id, sequence=1)
)
first = storage.Delete(request, metadata=ME, timeout=DEADLINE)
check(first.meta.attr.size == 5 and first.pruned_directories == 2, first)
check(storage.Delete(request, metadata=ME, timeout=DEADLINE) == first, "a repeated call gets the first answer")
request = storage_pb2.DeleteRequest(shard=where, key=b"a/b/c")
fails(NF, "NOT_FOUND", lambda: storage.Delete(request, metadata=ME, timeout=DEADLINE))
fails(
    FP, "SESSION_UNKNOWN", lambda: put(b"k", b"", write_id=common_pb2.WriteId(session_id=1 << 40, sequence=1))
)
node.files.CloseSession(
    files_pb2.CloseSessionRequest(header=files_pb2.CallHeader(shard_id=shard.id, session_id=session.session_id)),
    metadata=ME,
    timeout=DEADLINE,
)

# Somebody else's shard.
OTHER = (("shardfs-client-id", "somebody-else"),)
fails(
    grpc.StatusCode.PERMISSION_DENIED,
    "WRONG_OWNER",
    lambda: storage.Get(storage_pb2.GetRequest(shard=where, key=b"full"), metadata=OTHER, timeout=DEADLINE),
)
fails(
    NF,
    "SHARD_NOT_FOUND",
    lambda: storage.Get(storage_pb2.GetRequest(shard=by_name, key=b"full"), metadata=OTHER, timeout=DEADLINE),
)

# Rename, close, delete.
renamed = storage.RenameShard(
    storage_pb2.RenameShardRequest(shard=where, new_name="python-2"), metadata=ME, timeout=DEADLINE
)
check(renamed.id == shard.id and renamed.name == "python-2", renamed)
closed = storage.CloseShard(storage_pb2.CloseShardRequest(shard=where), metadata=ME, timeout=DEADLINE)
check(closed.state == common_pb2.SHARD_STATE_READ_ONLY, closed)
detail = fails(FP, "SHARD_READ_ONLY", lambda: put(b"late", b""))
check(detail.shard_id == shard.id and not detail.retryable, detail)
check(get(b"x").value == b"")
fails(
    FP,
    "SHARD_NOT_EMPTY",
    lambda: storage.DeleteShard(
        storage_pb2.DeleteShardRequest(shard=where, only_if_empty=True), metadata=ME, timeout=DEADLINE
    ),
)
deleted = storage.DeleteShard(storage_pb2.DeleteShardRequest(shard=where), metadata=ME, timeout=DEADLINE)
check(deleted.state == common_pb2.SHARD_STATE_DELETED, deleted)
fails(NF, "SHARD_DELETED", lambda: get(b"x"))
listed = list(any_node.storage.ListShards(storage_pb2.ListShardsRequest(), metadata=ME, timeout=DEADLINE))
check(not listed, listed)

print(f"ok {checks} checks")
