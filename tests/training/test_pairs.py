import pickle

from training.data.pairs import Skips, Strings


def test_skips_count_all_and_name_the_first_few() -> None:
    one, two = Skips(), Skips()
    for number in range(5):
        one.add("no image", f"one {number}")
        two.add("no image", f"two {number}")
    two.add("no caption", "x" * 10_000)
    two.ignored[".pkl"] += 1
    one.merge(pickle.loads(pickle.dumps(two)))
    assert one.total == 11
    assert one.examples["no image"] == ["one 0", "one 1", "one 2"]
    assert len(one.examples["no caption"][0]) == 200
    assert str(one).startswith("10 x no image (one 0, one 1, one 2); 1 x no caption (xxx")
    assert one.ignored == {".pkl": 1}


def test_strings_come_back_as_they_were() -> None:
    given = ["", "a", "größer 🦉", "a/b c.jpg", "\udcff.jpg", ""]  # the last but one: not UTF-8
    strings = Strings(given)
    assert [strings[i] for i in range(len(strings))] == given
    assert len(Strings([])) == 0
