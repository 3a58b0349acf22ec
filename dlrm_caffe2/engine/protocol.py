"""Messages between Caffe2Engine and its worker, version 1. Loaded by both: Python 3.7, standard library and NumPy.

A message is a header and the bytes of its arrays, on a stream socket:

    4 bytes, big-endian   length of the header
    header                a JSON object, UTF-8; `arrays` lists [name, dtype, shape] of each array, in order
    arrays                the bytes of each, little-endian and C-contiguous, one after another without padding

The worker speaks first: {"protocol": 1, "python": "3.9.18", "pytorch": "1.10.2+cu102", "operators": 986}. Then each
request gets one reply. A request names what to `do`; its other fields, and its arrays:

    feed                      arrays: blobs to create or overwrite
    fetch     names           the reply's arrays are these blobs
    run_once  -               array "": a serialized NetDef, run and not kept
    create    net             array "": a serialized NetDef, kept under the name `net`
    run       net, names      arrays: blobs to feed first; the reply's arrays are the blobs in `names`, fetched last
    profile   net             arrays: blobs to feed first; the reply's `seconds` are those in each operator type
    reset     -               drop every blob and net

A request that failed is answered {"error": text}, and the worker goes on. Either side ends by closing its socket.
"""

import json
import struct
from functools import reduce
from operator import mul

import numpy as np

VERSION = 1

DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "bool")
"""What Caffe2's FeedBlob takes."""

_LENGTH = struct.Struct(">I")

_CALL = 1 << 16
"""Small arrays are sent and received several at a time, up to this many bytes: system calls cost more than they do."""


def send(sock, header, arrays):
    """Send a dict and a dict of arrays. Raises OSError where the other side is gone."""
    arrays = {name: _portable(array) for name, array in arrays.items()}
    listed = [(name, array.dtype.str, array.shape) for name, array in arrays.items()]
    content = json.dumps(dict(header, arrays=listed)).encode()
    parts = [_LENGTH.pack(len(content)) + content, *(_bytes(array) for array in arrays.values())]
    for group in _groups([len(part) for part in parts]):
        sock.sendall(parts[group.start] if len(group) == 1 else b"".join(parts[group.start:group.stop]))


def receive(sock):
    """The next header, and its arrays by name. Raises EOFError or OSError where the other side is gone."""
    prefix = np.empty(_LENGTH.size, np.uint8)
    _fill(sock, prefix)
    content = np.empty(_LENGTH.unpack(prefix.tobytes())[0], np.uint8)
    _fill(sock, content)
    header = json.loads(content.tobytes().decode())
    listed = [(name, np.dtype(dtype), shape) for name, dtype, shape in header["arrays"]]
    sizes = [reduce(mul, shape, dtype.itemsize) for _, dtype, shape in listed]
    arrays = {}
    for group in _groups(sizes):
        together = np.empty(sum(sizes[group.start:group.stop]), np.uint8)
        _fill(sock, together)
        start = 0
        for number in group:
            name, dtype, shape = listed[number]
            array = together[start:start + sizes[number]].view(dtype).reshape(shape)
            arrays[name] = array if len(group) == 1 else array.copy()
            start += sizes[number]
    return header, arrays


def _groups(sizes):
    """Ranges of consecutive parts that travel together: as many as fit into one call, a larger part alone."""
    start = total = 0
    for number, size in enumerate(sizes):
        if number > start and total + size > _CALL:
            yield range(start, number)
            start = number
            total = 0
        total += size
    if start < len(sizes):
        yield range(start, len(sizes))


def _portable(array):
    """Little-endian and C-contiguous; copied only where it is not. (ascontiguousarray would lose a shape of ().)"""
    if array.flags.c_contiguous and array.dtype.str[0] != ">":
        return array
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def _bytes(array):
    return memoryview(array.reshape(-1).view(np.uint8))


def _fill(sock, array):
    rest = _bytes(array)
    while rest:
        count = sock.recv_into(rest)
        if not count:
            raise EOFError("the other side closed the connection")
        rest = rest[count:]
