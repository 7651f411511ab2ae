"""Hand an array to Triton's python backend, whatever NumPy there is; copied beside each model.py.

Triton's own ways to and from NumPy were built for NumPy 1. With NumPy 2 and Triton 2.51,
`Tensor(name, array)` holds no bytes, `Tensor.as_numpy` repeats the first element, and
`Tensor.from_dlpack(name, array)` leaves NumPy a capsule that it cannot free. So the capsule is made
here: one block of the C heap, header, shape and data, whose deleter is C's `free`.

Source: dmlc/dlpack `include/dlpack/dlpack.h` version 0.8, DLManagedTensor.
"""

import ctypes

import numpy as np


class Loan:
    """A copy of an array of numbers for one DLPack consumer, who frees it."""

    def __init__(self, array):
        self._array = np.ascontiguousarray(array)

    def __dlpack_device__(self):
        return _ON_CPU

    def __dlpack__(self, stream=None):
        shape, dtype = self._array.shape, self._array.dtype
        head_bytes = ctypes.sizeof(_ManagedTensor) + 8 * len(shape)
        block = _libc.malloc(head_bytes + self._array.nbytes)
        if not block:
            raise MemoryError(f"no {self._array.nbytes} bytes for the answer")
        managed = _ManagedTensor.from_address(block)
        managed.data = block + head_bytes
        managed.device_type, managed.device_id = _ON_CPU
        managed.ndim = len(shape)
        managed.code, managed.bits, managed.lanes = _CODES[dtype.kind], 8 * dtype.itemsize, 1
        managed.shape = block + ctypes.sizeof(_ManagedTensor)
        managed.strides = None
        managed.byte_offset = 0
        managed.manager_ctx = None
        managed.deleter = ctypes.cast(_libc.free, ctypes.c_void_p).value
        (ctypes.c_int64 * len(shape)).from_address(managed.shape)[:] = shape
        ctypes.memmove(managed.data, self._array.ctypes.data, self._array.nbytes)
        return _new_capsule(block, b"dltensor", None)


class _ManagedTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_ON_CPU = (1, 0)
_CODES = {"i": 0, "u": 1, "f": 2}
_libc = ctypes.CDLL(None)
_libc.malloc.restype, _libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
