"""Images prepared on several threads: the same squares in the same order, and no more threads."""

from __future__ import annotations

import gc
import io
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from owners import wait_until
from PIL import Image, ImageSequence
from processes import running

from clip_rt import telemetry
from clip_rt.errors import ImageError, InputError
from clip_rt.inputs import images as images_module
from clip_rt.inputs.images import MAX_THREADS, count_threads, prepare_each, preprocess
from clip_rt.inputs.transform import prepare

ROOT = Path(__file__).parents[2]


def draw(seed: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, file_format: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


JPEGS = [encode(draw(seed)) for seed in range(12)]


class Counted:
    """A path that is slow to open, and who opens it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.threads: list[threading.Thread] = []
        self.at_once = self.most_at_once = 0
        self.may_go_on = threading.Event()
        self._lock = threading.Lock()

    def __fspath__(self) -> str:
        with self._lock:
            self.threads.append(threading.current_thread())
            self.at_once += 1
            self.most_at_once = max(self.at_once, self.most_at_once)
        self.may_go_on.wait(20)
        with self._lock:
            self.at_once -= 1
        return str(self.path)


os.PathLike.register(Counted)


@pytest.fixture
def counted(tmp_path: Path) -> Iterator[Counted]:
    path = tmp_path / "a.jpg"
    path.write_bytes(JPEGS[0])
    counted = Counted(path)
    yield counted
    counted.may_go_on.set()


def run(program: str, *args: object, timeout_s: float = 60) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# The same results


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_threads_change_neither_results_nor_order(tmp_path, num_threads):
    path = tmp_path / "a.png"
    path.write_bytes(encode(draw(77), "PNG"))
    mixed = [draw(1), path, *JPEGS, np.asarray(draw(2)), str(path), bytearray(JPEGS[0])]
    mixed += [np.asarray(draw(3, (64, 64))), memoryview(JPEGS[1]), *JPEGS[::-1]]
    expected = np.stack([prepare(image, side_px=64) for image in mixed])
    assert len({square.tobytes() for square in expected}) == len(mixed) - len(JPEGS) - 3
    for images in (mixed, tuple(mixed), iter(mixed), (image for image in mixed)):
        found = preprocess(images, side_px=64, num_threads=num_threads)
        np.testing.assert_array_equal(found, expected)


def test_arrays_of_images_are_prepared_on_threads_too():
    batch = np.stack([np.asarray(draw(seed)) for seed in range(9)])
    found = preprocess(batch, side_px=32, num_threads=2)
    np.testing.assert_array_equal(found, preprocess(batch, side_px=32))


@pytest.mark.parametrize("nothing", [[], iter(()), np.empty((0, 9, 9, 3), np.uint8)])
def test_no_images_give_nothing(nothing):
    assert list(prepare_each(nothing, num_threads=4)) == []


@pytest.mark.parametrize("kind", ["array", "bytearray", "frames"])
def test_what_a_generator_overwrites_was_finished_before(kind):
    pictures = [np.asarray(draw(seed)) for seed in range(8)]
    if kind == "frames":
        first, *rest = [Image.fromarray(picture) for picture in pictures]
        file = encode(first, "PNG", save_all=True, append_images=rest)
        images = ImageSequence.Iterator(Image.open(io.BytesIO(file)))
    else:
        images = overwrite(pictures, kind)
    found = preprocess(images, side_px=48, num_threads=4)
    np.testing.assert_array_equal(found, preprocess(pictures, side_px=48))


def overwrite(pictures, kind):
    files = [encode(Image.fromarray(picture), "BMP") for picture in pictures]
    buffer = bytearray(files[0]) if kind == "bytearray" else pictures[0].copy()
    for picture, file in zip(pictures, files, strict=True):
        buffer[:] = file if kind == "bytearray" else picture
        yield buffer


def test_squares_are_not_shared_with_the_images():
    array = np.asarray(draw(1, (32, 32))).copy()
    before = array.copy()
    for square in prepare_each([array, array], side_px=32, num_threads=2):
        np.testing.assert_array_equal(square, before)
        square[:] = 0
    np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize("layout", ["F", "mirrored", "read-only"])
def test_a_square_array_passes_whatever_its_strides(layout):
    square = np.asarray(draw(1, (40, 40)))
    array = {
        "F": np.asfortranarray(square),
        "mirrored": np.ascontiguousarray(square[:, ::-1])[:, ::-1],
        "read-only": square,
    }[layout]
    found = prepare(array, side_px=40)
    np.testing.assert_array_equal(found, square)
    assert found.flags.c_contiguous
    assert found.flags.writeable
    with pytest.raises(ImageError, match="max_pixels"):
        prepare(array, side_px=40, max_pixels=1599)


class Shared(io.BytesIO):
    """A file that gives a second reader time to come, and notes whether one did."""

    is_watched = False
    at_once = 0

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.two_came = threading.Event()

    def read(self, size: int | None = -1) -> bytes:
        self.at_once += 1
        if self.at_once > 1:
            self.two_came.set()
        if self.is_watched:
            self.two_came.wait(0.1)
        try:
            return super().read(size)
        finally:
            self.at_once -= 1


def test_one_pillow_image_may_be_prepared_by_many_threads_at_once():
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = encode(draw(5, (500, 300)), exif=exif.tobytes())
    file = Shared(encoded)
    opened = Image.open(file)
    file.is_watched = True
    found = preprocess([opened] * 8, side_px=64, num_threads=8)
    assert (found == prepare(encoded, side_px=64)).all()
    assert not file.two_came.is_set()


# Errors


BAD = b"bad"


@pytest.mark.parametrize("num_threads", [1, 3])
def test_an_error_comes_after_the_squares_before_it(num_threads):
    squares = prepare_each([*JPEGS[:5], BAD, *JPEGS], num_threads=num_threads)
    assert len(list(itertools.islice(squares, 5))) == 5
    with pytest.raises(ImageError, match=r"image 5 \(bytes\) is no readable") as caught:
        next(squares)
    assert caught.value.index == 5
    assert type(caught.value.__cause__).__name__ == "UnidentifiedImageError"


@pytest.mark.parametrize("num_threads", [1, 3])
def test_skip_yields_errors_in_their_place(num_threads):
    images = [BAD, JPEGS[0], None, JPEGS[1], BAD, JPEGS[2], JPEGS[3][:200], BAD]
    found = list(prepare_each(images, side_px=32, num_threads=num_threads, on_error="skip"))
    failures = {each.index: each for each in found if isinstance(each, ImageError)}
    assert sorted(failures) == [0, 2, 4, 6, 7]
    for index in (1, 3, 5):
        np.testing.assert_array_equal(found[index], prepare(images[index], side_px=32))


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_no_error_keeps_its_picture_in_memory(num_threads, on_error):
    gc.collect()
    gc.disable()
    try:
        alive, errors = [], []
        for _ in range(5):
            images = [np.zeros((900, 900, 3)) for _ in range(2)]
            alive += [weakref.ref(image) for image in images]
            try:
                results = prepare_each(images, num_threads=num_threads, on_error=on_error)
                errors += list(results)
            except ImageError as error:
                errors.append(error.index)
            del images, results
        assert len(errors) == (10 if on_error == "skip" else 5)
        # A thread lets go of its last image a moment after it has handed over the result.
        assert wait_until(lambda: not any(reference() is not None for reference in alive))
    finally:
        gc.enable()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_an_error_of_the_generator_comes_out_unchanged_after_the_images_before_it(num_threads):
    failure = OSError("the disk is on fire")

    def images():
        yield from JPEGS[:7]
        raise failure

    squares = prepare_each(images(), num_threads=num_threads)
    assert len(list(itertools.islice(squares, 7))) == 7
    with pytest.raises(OSError, match="on fire") as caught:
        next(squares)
    assert caught.value is failure
    assert caught.traceback[-1].name == "images"


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_threads", 0),
        ("num_threads", -1),
        ("num_threads", 1.5),
        ("num_threads", None),
        ("decode", "quick"),
        ("decode", None),
        ("side_px", 0),
    ],
)
def test_bad_arguments_are_refused_even_for_no_images(argument, value):
    with pytest.raises(InputError, match=argument):
        preprocess([], **{argument: value})


# How far ahead, on which threads, and the end


def test_the_source_is_read_lazily_here_and_no_further_than_the_window(counted):
    here, asked = threading.current_thread(), []

    def images():
        for index in itertools.count():
            assert threading.current_thread() is here
            asked.append(index)
            yield counted

    squares = prepare_each(images(), num_threads=3)
    assert asked == []
    reader = threading.Timer(0.3, counted.may_go_on.set)
    reader.start()
    for number in range(1, 30):
        assert next(squares).shape == (224, 224, 3)
        assert len(asked) <= number + 2 * 3
    squares.close()
    assert here not in counted.threads
    assert counted.most_at_once == 3


def test_a_result_that_is_ready_does_not_wait_for_the_next_image():
    asked = []

    def images():
        for index in range(4):
            asked.append(index)
            yield np.asarray(draw(index))

    for number, _ in enumerate(prepare_each(images(), num_threads=4), start=1):
        assert len(asked) == number


def test_one_image_uses_no_thread(counted):
    counted.may_go_on.set()
    for images in (counted, [counted], (counted,)):
        list(prepare_each(images, num_threads=4))
    assert set(counted.threads) == {threading.current_thread()}


def test_closing_early_drops_what_waits(counted):
    squares = prepare_each([JPEGS[0], *[counted] * 50], num_threads=2)
    next(squares)
    wait_until(lambda: counted.at_once == 2)
    start_s = time.monotonic()
    squares.close()
    assert time.monotonic() - start_s < 1
    counted.may_go_on.set()
    # The threads are free for others, and before those they would have come to what was dropped.
    assert len(list(prepare_each(JPEGS * 2, num_threads=2))) == 24
    assert len(counted.threads) == 2 * 2, "each path is looked up, and then opened"


def test_all_calls_share_the_threads():
    def decode():
        assert len(preprocess(JPEGS * 3, num_threads=3)) == 36

    callers = [threading.Thread(target=decode) for _ in range(12)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert len(images_module._threads(3)._threads) <= 3


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images():
    program = """
        import io, itertools, resource
        import numpy as np
        from PIL import Image
        from clip_rt.inputs.images import prepare_each
        file = io.BytesIO()
        Image.new("RGB", (3000, 2000), "orange").save(file, "JPEG")
        def peak_mib():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        def images(number):
            for _ in range(number):
                yield bytes(bytearray(file.getvalue()))
        for square in prepare_each(images(6), num_threads=2):
            pass
        before = peak_mib()
        for square in prepare_each(images(24), num_threads=2):
            pass
        print(peak_mib() - before)
    """
    # A decoded picture has 24 MB; two are at work, and the allocator's mood is a third.
    assert float(run(program)) < 24


def test_ctrl_c_ends_it(tmp_path):
    program = """
        import io, itertools
        from PIL import Image
        from clip_rt.inputs.images import prepare_each
        file = io.BytesIO()
        Image.effect_noise((1500, 1500), 90).convert("RGB").save(file, "JPEG")
        try:
            squares = prepare_each(itertools.repeat(file.getvalue()), num_threads=2)
            for number, square in enumerate(squares):
                if number == 3:
                    print("at work", flush=True)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """
    with running(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout.readline() == "at work\n"
        process.send_signal(signal.SIGINT)
        start_s = time.monotonic()
        output, _ = process.communicate(timeout=30)
    assert (output, process.returncode) == ("interrupted\n", 0)
    assert time.monotonic() - start_s < 10


def test_it_works_while_the_interpreter_ends():
    program = """
        import atexit, io
        from PIL import Image
        from clip_rt.inputs.images import preprocess
        file = io.BytesIO()
        Image.new("RGB", (60, 50)).save(file, "JPEG")
        images = [file.getvalue()] * 5
        preprocess(images, num_threads=2)
        atexit.register(lambda: print(preprocess(images, num_threads=2).shape))
    """
    assert run(program) == "(5, 224, 224, 3)\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_has_threads_of_its_own_and_leaves_the_parent_s():
    program = """
        import io, itertools, os, warnings
        import numpy as np
        from PIL import Image
        from clip_rt import errors
        from clip_rt.inputs.images import prepare_each, preprocess
        warnings.simplefilter("ignore")
        files = []
        for seed in range(8):
            noise = np.random.default_rng(seed).integers(0, 256, (90, 70, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(noise).save(file, "PNG")
            files.append(file.getvalue())
        expected = preprocess(files)
        assert (preprocess(files, num_threads=2) == expected).all()
        begun = prepare_each(itertools.cycle(files), num_threads=2)
        next(begun)
        for _ in range(3):
            if os.fork() == 0:
                assert (preprocess(files, num_threads=2) == expected).all()
                try:
                    next(begun)
                except errors.InputError as error:
                    assert "after the fork" in str(error)
                    os._exit(7)
                os._exit(1)
        print([os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(3)])
        assert (preprocess(files, num_threads=2) == expected).all()
        assert (np.stack(list(itertools.islice(begun, 7))) == expected[1:]).all()
    """
    assert run(program) == "[7, 7, 7]\n"


def test_a_generator_collected_by_one_of_its_own_threads_does_not_hang():
    """Pytest cannot choose who collects garbage; a path that collects it can."""
    abandoned, is_abandoned, begun, ended = [], threading.Event(), [], []

    class Collects:
        def __fspath__(self):
            begun.append(self)
            is_abandoned.wait(20)
            abandoned.clear()
            ended.append(self)
            return os.devnull

    os.PathLike.register(Collects)
    squares = prepare_each([JPEGS[0], *[Collects()] * 9], num_threads=2, on_error="skip")
    next(squares)
    abandoned.append(squares)
    del squares
    is_abandoned.set()
    assert wait_until(lambda: len(begun) == len(ended) > 0)
    assert len(preprocess(JPEGS, num_threads=2)) == 12


def test_threads_report_to_whoever_asked():
    with telemetry.measure() as timings:
        preprocess(JPEGS, num_threads=2)
    assert timings.counts == {"decode": 12, "resize": 12}
    assert timings.seconds["decode"] > 0


def test_threads_by_default_are_the_cores_of_this_process():
    assert 1 <= count_threads() <= MAX_THREADS
    if hasattr(os, "sched_getaffinity"):
        program = """
            import os
            from clip_rt.inputs.images import count_threads
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            print(count_threads())
        """
        assert run(program) == "1\n"
