"""Messages between Caffe2Engine and its worker. Loaded by both: Python 3.7, standard library and NumPy.

A message is a header and arrays, on a stream socket, and in memory that both sides share where there is any:

    4 bytes, big-endian   length of the header
    header                a JSON object, UTF-8; `arrays` lists [name, dtype, shape, place] of each array, in order
    arrays                the bytes of those whose place is null, one after another without padding

An array is little-endian and C-contiguous. `place` is where it begins in the shared memory, which holds one message: it
is good until the receiver sends its own. What does not fit goes through the socket, at a fifth of the speed.

The worker speaks first: {"protocol": 3, "python": "3.9.18", "pytorch": "1.10.2+cu102", "operators": 986}. Then each
request gets one reply. A request names what to `do`; its other fields, and its arrays:

    feed                      arrays: blobs to create or overwrite
    fetch     names           the reply's arrays are these blobs
    run_once  -               array "": a serialized NetDef, run and not kept
    create    net             arrays: serialized NetDefs by their names; run in their order they are the net `net`, kept
    run       net, names      arrays: blobs to feed first; the reply's arrays are the blobs in `names`, fetched last
    profile   net             arrays: blobs to feed first; the reply's `seconds` are those in the operators of
                              each name, or type where they have no name
    reset     -               drop every blob and net

A request that failed is answered {"error": text}, and the worker goes on. Either side ends by closing its socket.
"""

import json
import mmap
import struct

import numpy as np

VERSION = 3

DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "bool")
"""What Caffe2's FeedBlob takes."""

_LENGTH = struct.Struct(">I")

_ALIGNED = 64
"""Bytes, of the arrays in shared memory."""


def shared_memory(descriptor):
    """All of an open file's memory, as bytes."""
    return np.frombuffer(mmap.mmap(descriptor, 0), np.uint8)


def send(sock, header, arrays, memory=None):
    """Send a dict and a dict of arrays. Raises OSError where the other side is gone."""
    listed, rest, end = [], [], 0
    for name, array in arrays.items():
        array = _portable(array)
        place = None
        if memory is not None and end + array.nbytes <= len(memory):
            place = end
            memory[place:place + array.nbytes] = _bytes(array)
            end += -(-array.nbytes // _ALIGNED) * _ALIGNED
        else:
            rest.append(array)
        listed.append((name, array.dtype.str, array.shape, place))
    content = json.dumps(dict(header, arrays=listed)).encode()
    sock.sendall(_LENGTH.pack(len(content)) + content)
    for array in rest:
        sock.sendall(_bytes(array))


def receive(sock, memory=None):
    """The next header, and its arrays by name. Raises EOFError or OSError where the other side is gone."""
    prefix = np.empty(_LENGTH.size, np.uint8)
    _fill(sock, prefix)
    content = np.empty(_LENGTH.unpack(prefix.tobytes())[0], np.uint8)
    _fill(sock, content)
    header = json.loads(content.tobytes().decode())
    arrays = {}
    for name, dtype, shape, place in header["arrays"]:
        if place is None:
            arrays[name] = np.empty(shape, dtype)
            _fill(sock, arrays[name])
        else:
            arrays[name] = np.ndarray(shape, dtype, memory, place)
    return header, arrays


def _portable(array):
    """Little-endian and C-contiguous; copied only where it is not. (ascontiguousarray would lose a shape of ().)"""
    if array.flags.c_contiguous and array.dtype.str[0] != ">":
        return array
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def _bytes(array):
    return array.reshape(-1).view(np.uint8)


def _fill(sock, array):
    rest = memoryview(_bytes(array))
    while rest:
        count = sock.recv_into(rest)
        if not count:
            raise EOFError("the other side closed the connection")
        rest = rest[count:]
