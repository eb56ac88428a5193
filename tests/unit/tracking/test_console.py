"""The display on a terminal, as plain lines, and switched off; text of others; a terminal that is given back."""

import io
import re
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console as RichConsole

from tests.terminals import on_a_terminal
from tlscale.tracking.console import Console, visible
from tlscale.tracking.progress import Pace, each
from tlscale.tracking.stopwatch import format_duration

SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


class FakeClock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def terminal(width=100):
    return RichConsole(
        file=io.StringIO(), force_terminal=True, width=width, color_system="standard", legacy_windows=False
    )


def plain():
    return RichConsole(file=io.StringIO(), force_terminal=False)


def text_of(console):
    return console.file.getvalue()


def figures(**changes):
    return {"loss": 0.43123, "lr": 9.8e-4, "images_per_s": 711.6, "epoch": 1.26, **changes}


def test_a_plain_line():
    console, clock = plain(), FakeClock()
    with Console(console=console, clock=clock).begin(940) as progress:
        clock.now += 12.0
        progress.update(20, **figures())
        clock.now += 60.0
        progress.update(120, **figures(), best=0.91234)
    lines = text_of(console).splitlines()
    assert lines[0] == "step  20/940  epoch 1.3  loss 0.4312  lr 9.8e-04  712 images/s  eta 9m12s"
    assert lines[1] == "step 120/940  epoch 1.3  loss 0.4312  lr 9.8e-04  712 images/s  eta 8m12s  best 0.9123"
    assert len(lines) == 2


def test_every_plain_update_is_a_line_without_escape_sequences():
    console, clock = plain(), FakeClock()
    with Console(console=console, clock=clock).begin(10**7) as progress:
        for step in range(50):
            progress.update(step, **figures(loss=float("nan"), images_per_s=1.2e6), best=0.5)
        progress.say("note", style="bold red")
    lines = text_of(console).splitlines()
    assert len(lines) == 51
    assert "\x1b" not in text_of(console)
    assert "loss nan" in lines[0]
    assert all(len(line) < 120 for line in lines)


def test_other_ranks_show_nothing_and_leave_the_terminal_alone():
    console = terminal()
    with Console(enabled=False, console=console).begin(10) as progress:
        progress.update(10, **figures())
        progress.say("text")
        progress.table("title", ["a"], [["b"]])
    assert text_of(console) == ""


def test_a_live_display_shows_all_figures():
    console, clock = terminal(), FakeClock()
    with Console(console=console, clock=clock).begin(940) as progress:
        clock.now += 12.0
        progress.update(120, **figures(), best=0.91)
    shown = text_of(console)
    for part in ("120/940", "12%", "epoch 1.3", "loss 0.4312", "lr 9.8e-04", "712 images/s", "eta 1m22s", "best 0.91"):
        assert part in shown


def test_one_console_serves_before_during_and_after_progress():
    output, clock = terminal(), FakeClock()
    console = Console(console=output, clock=clock)
    console.say("before")
    for total, last in ((940, 120), (60, 60)):
        with console.begin(total):
            clock.now += 12.0
            console.update(last, **figures())
            console.say("during")
    console.say("after")
    shown = text_of(output)
    assert shown.index("before") < shown.index("120/940") < shown.rindex("60/60") < shown.index("after")
    assert "120/60" not in shown, "the figures of the first are gone"
    assert shown.count(HIDE_CURSOR) == shown.count(SHOW_CURSOR) == 2
    console.update(60, **figures())
    assert "step 60/60" in text_of(output).splitlines()[-1], "a plain line"


def test_a_narrow_terminal_is_not_overrun():
    console = terminal(width=30)
    with Console(console=console).begin(940) as progress:
        progress.update(120, **figures(), best=0.91)
    assert "120/940" in text_of(console)
    assert "best" not in text_of(console)


def test_a_live_display_redraws_at_most_five_times_a_second_and_ends_on_the_last_figures():
    console, clock = terminal(), FakeClock()
    with Console(console=console, clock=clock).begin(100_000) as progress:
        for step in range(1, 2001):  # two seconds
            clock.now += 0.001
            progress.update(step, **figures(loss=step))
    drawn = text_of(console).count("images/s")
    assert 8 <= drawn <= 14
    assert "loss 2000.0000" in text_of(console)


def test_the_last_step_is_drawn_at_once():
    console, clock = terminal(), FakeClock()
    with Console(console=console, clock=clock).begin(2) as progress:
        progress.update(1, **figures())
        progress.update(2, **figures())
        assert "100%" in text_of(console)


def test_no_thread_is_started():
    before = threading.active_count()
    with Console(console=terminal()).begin(10) as progress:
        progress.update(1, **figures())
        assert threading.active_count() == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_terminal_as_it_was(error):
    console, stdout, stderr = terminal(), sys.stdout, sys.stderr

    def run():
        with Console(console=console).begin(10) as progress:
            progress.update(1, **figures())
            raise error

    with pytest.raises(error):
        run()
    shown = text_of(console)
    assert shown.count(HIDE_CURSOR) == shown.count(SHOW_CURSOR) == 1
    assert shown.index(HIDE_CURSOR) < shown.index(SHOW_CURSOR)
    assert (sys.stdout, sys.stderr) == (stdout, stderr)


@pytest.mark.parametrize("make", [terminal, plain])
def test_text_is_shown_as_it_is(make):
    console = make()
    console.width = 100
    name = "[bold]cat[/bold] [link=x]y \x1b[31mred\x1b[0m \x9b2J \u202eabc :smile: {0} é"
    with Console(console=console).begin(10) as progress:
        progress.update(1, **figures())
        progress.say(name, style="bold")
        progress.table("[red]title", ["[a]", "n"], [[name, 1]])
    shown = text_of(console)
    spelled = r"[bold]cat[/bold] [link=x]y \x1b[31mred\x1b[0m \x9b2J \u202eabc :smile: {0} é"
    assert shown.count(spelled) == 2
    assert "[red]title" in shown
    assert "[a]" in shown
    assert "\x1b[31m" not in shown
    assert "\x9b" not in shown


def test_a_name_cannot_fake_a_line():
    console = plain()
    shown = Console(console=console)
    shown.say("class 'a\ntop1 1.0000' is empty")
    shown.say("cannot be resumed:\n  optim.lr: 1 -> 2")
    shown.table("Hardest classes", ["class\nx", "n"], [["cat\n  top1 1.0000", 1], ["\u2028dog", 2]])
    lines = [line.strip() for line in text_of(console).splitlines()]
    assert not [line for line in lines if line.startswith("top1")]
    assert r"class 'a\ntop1 1.0000' is empty" in lines
    assert "optim.lr: 1 -> 2" in lines
    assert r"\u2028dog" in text_of(console)


@given(st.text())
def test_visible_text_has_no_control_characters_and_keeps_the_rest(text):
    shown = visible(text)
    assert not any(ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160 for c in shown)
    assert all(line.startswith("  ") for line in shown.split("\n")[1:])
    if text.isprintable():
        assert shown == text.encode("utf-8", "backslashreplace").decode()
    visible(text, "ascii").encode("ascii")


def test_a_console_that_cannot_spell_a_name_does_not_stop_the_run():
    raw = io.BytesIO()
    console = RichConsole(file=io.TextIOWrapper(raw, encoding="ascii", write_through=True), force_terminal=False)
    with Console(console=console).begin(10) as progress:
        progress.say("naïve 猫")
        progress.table("猫", ["猫"], [["猫"]])
        progress.update(1, **figures())
    assert rb"na\xefve \u732b" in raw.getvalue()


def test_a_table_in_a_file_is_never_cut_or_folded():
    console = plain()
    name = "x" * 150
    with Console(console=console).begin(10) as progress:
        progress.table("Freeze rules", ["rule", "tensors", "share"], [[name, 12, "50%"], ["b", 1234, "1%"]])
    lines = [line.rstrip() for line in text_of(console).splitlines() if line.strip()]
    assert lines[0].strip() == "Freeze rules"
    assert any(re.search(rf"{name} +12 +50%$", line) for line in lines)
    assert any(re.search(r"b +1234 +1%$", line) for line in lines)
    assert len({len(line) for line in lines[-2:]}) == 1  # numbers stand to the right


def test_long_text_in_a_file_is_one_line():
    console = plain()
    Console(console=console).say("word " * 60)
    assert len(text_of(console).splitlines()) == 1


def test_the_eta_is_not_moved_by_a_pause_or_a_slow_first_step():
    console, clock = plain(), FakeClock()
    with Console(console=console, clock=clock).begin(1000, 500) as progress:
        clock.now += 300.0  # compiles
        progress.update(510, **figures())
        for step in range(520, 620, 10):
            clock.now += 3600.0 if step == 560 else 10.0  # evaluates once
            progress.update(step, **figures())
    assert "eta 4h05m" in text_of(console).splitlines()[0]
    assert "eta 6m30s" in text_of(console).splitlines()[-1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (312, "5m12s"), (11220, "3h07m"), (187200, "2d04h"), (-3, "0s")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_in_a_real_terminal_prints_of_others_go_above_the_display_and_the_cursor_comes_back():
    program = (
        "from tlscale.tracking.console import Console\n"
        "with Console().begin(10) as progress:\n"
        "    progress.update(5, loss=1.0, lr=0.1, images_per_s=5, epoch=0.5)\n"
        "    print('from elsewhere')\n"
        "    progress.say('said')\n"
        "    raise SystemExit(3)\n"
    )
    code, shown = on_a_terminal(program, COLUMNS="80")
    assert code == 3
    text = shown.decode()
    assert text.rindex(SHOW_CURSOR) > text.rindex(HIDE_CURSOR)
    assert "from elsewhere\r\n" in text
    assert text.rindex("5/10") > text.index("said")


def test_long_work_is_a_bar_on_a_terminal_and_leaves_nothing():
    output, clock = terminal(width=80), FakeClock()
    console = Console(console=output, clock=clock)
    with console.shows_progress():
        Pace(10, "short", clock=clock).add(10)
        pace = Pace(2000, "decoding train", clock=clock)
        for done in range(1, 2001):
            clock.now += 0.001
            pace.add(1)
            if done == 1500:
                console.say("a note")
    shown = text_of(output)
    assert "short" not in shown
    assert 4 <= shown.count("decoding train") <= 12, "after half a second, and five times a second"
    assert "1000 images/s" in shown
    assert "━" in shown
    assert shown.count(HIDE_CURSOR) == shown.count(SHOW_CURSOR) == 1
    last = shown[shown.rindex("decoding train") :]
    assert "\x1b[2K" in last, "the line is erased"
    assert "\n" not in last.replace("\x1b[2K\n", "\x1b[2K"), "older versions of rich leave one empty line"


def test_a_bar_of_unknown_length_and_one_that_fails_are_taken_away():
    output, clock = terminal(width=80), FakeClock()
    console = Console(console=output)

    def work():
        with Pace(None, "scanning a", clock=clock) as pace:
            clock.now += 1
            pace.add(5)
        assert text_of(output).count(SHOW_CURSOR) == 1
        pace = Pace(100, "scanning b", clock=clock)
        clock.now += 1
        pace.add(5)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"), console.shows_progress():
        work()
    shown = text_of(output)
    assert "scanning a: 5 images, 5 images/s" in shown
    assert "5 of 100 images" in shown
    assert shown.count(HIDE_CURSOR) == shown.count(SHOW_CURSOR) == 2


def test_long_work_within_training_is_shown_below_its_figures():
    output, clock = terminal(width=80), FakeClock()
    console = Console(console=output, clock=clock)
    with console.shows_progress(), console.begin(940):
        console.update(120, **figures())
        pace = Pace(100, "codes of train", clock=clock)
        clock.now += 1
        pace.add(50)
        both = text_of(output)
        pace.add(50)
        console.update(940, **figures())
    assert both.index("120/940") < both.index("codes of train")
    assert text_of(output).rindex("codes of train") < text_of(output).index("940/940")
    assert text_of(output).count(HIDE_CURSOR) == 1, "one display"


@pytest.mark.parametrize("make", [terminal, plain])
def test_each_of_several_fits_is_shown(make):
    output = make()
    with Console(console=output).shows_progress():
        assert list(each([1, 2], lambda strength: f"probe: strength {strength}")) == [1, 2]
    shown = text_of(output)
    assert shown.index("probe: strength 1") < shown.index("probe: strength 2")
    assert "2 of 2" in shown
    assert list(each([1, 2], str)) == [1, 2], "without a console"


def test_data_on_standard_output_stay_apart_from_a_bar(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    console, clock = Console(stderr=True), FakeClock()
    pace = Pace(10, "scanning", console, clock=clock)
    clock.now += 1
    stdout = sys.stdout
    pace.add(1)
    assert sys.stdout is stdout
    assert sys.stderr is not sys.__stderr__
    console.end_work()


ROWS = [
    ("early_codes", "1,000", "0.8840 (0.8712 to 0.8901)", "best, with 95 % confidence", "0.88", "12.5", "layer3")
] * 2
HEADS = ("strategy", "images", "top1", "against the best", "held-out top1", "seconds", "layer of the codes")


@pytest.mark.parametrize("make", [terminal, plain])
@pytest.mark.parametrize("width", [36, 50, 80, 200])
def test_a_table_fits_the_screen(make, width):
    console = make()
    console.width = width
    Console(console=console).table("Side by side", HEADS, ROWS, num_keys=2)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text_of(console)).splitlines()
    assert max(map(len, lines)) <= width
    words = {word for row in (HEADS, *ROWS) for cell in row for word in cell.split()}
    assert words <= set(" ".join(lines).split()), "no word is broken where the columns are wide enough"
    heads = [line for line in lines if "strategy" in line]
    assert len(heads) == {36: 5, 50: 4, 80: 1, 200: 1}[width]
    assert all("images" in line for line in heads)
    assert sum("Side by side" in line for line in lines) == 1


def test_only_a_terminal_breaks_words():
    for make in (terminal, plain):
        console = make()
        console.width = 40
        Console(console=console).table("", ("file", "why"), [("a" * 50, "no")])
        text = re.sub(r"\x1b\[[0-9;]*m", "", text_of(console))
        assert ("a" * 50 in text) == (make is plain)
        assert text.count("a") == 50


def test_a_long_line_on_a_terminal_is_indented():
    console = terminal(width=40)
    Console(console=console).say("ok    disk      " + "many words " * 8, indent=16)
    lines = text_of(console).splitlines()
    assert lines[0].startswith("ok    disk      many")
    assert all(line.startswith(" " * 16 + "many") or line.startswith(" " * 16 + "words") for line in lines[1:])
    console = plain()
    Console(console=console).say("word " * 60, indent=16)
    assert len(text_of(console).splitlines()) == 1


@pytest.mark.parametrize("total", [None, 2000])
def test_a_long_path_costs_a_bar_no_figure(total):
    output, clock = terminal(width=80), FakeClock()
    pace = Pace(total, "scanning " + "/a/long/path" * 10 + "/train", Console(console=output), clock=clock)
    clock.now += 1
    pace.add(1500)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text_of(output))
    assert len(shown) == len(shown.splitlines()[0]) <= 80
    assert re.search(r"scanning /a.*….*/train.*1,500 .*1500 images/s", shown)
    pace.end()
