"""When Python looks for garbage, and when not."""

import gc

import pytest

from pipeline.garbage import collecting_nothing


def test_imports_are_not_searched_and_everything_after_them_is() -> None:
    with collecting_nothing():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_what_fails_is_searched_again() -> None:
    with pytest.raises(ImportError), collecting_nothing():
        raise ImportError
    assert gc.isenabled()


def test_who_collects_nothing_is_left_alone() -> None:
    gc.disable()
    try:
        with collecting_nothing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
