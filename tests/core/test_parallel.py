"""One video on several devices, here processes or threads on one CPU: the same video, and no more bytes than by the formula."""

import re
import sys
import threading
import time
import weakref

import pytest
import torch

from mochi_core.parallel import group as group_module
from mochi_core.parallel.decode import rounds_of
from mochi_core.parallel.group import Alone, Stopped, Threads
from mochi_core.parallel.plan import Plan, choose
from mochi_core.parallel.sequence import shares, unit_of
from mochi_core.parallel.team import Members
from mochi_core.quantization.weights import QUANTIZERS
from mochi_core.sampling.block_cache import relative_change
from mochi_core.sampling.given import Given
from mochi_core.sampling.guidance import Guidance
from tests.harness import parallel_runs
from tests.harness.members import MemberPool
from tests.harness.products import is_the_same
from tests.harness.tiny_models import VAE

# prompts' lengths, latent size (T, H, W), most tokens of a prompt
SIZES = {
    "75 tokens, 9 and 3 words": ([9, 3], (3, 9, 10), 16),
    "77 tokens, 20 words": ([20], (7, 3, 22), 32),
    "no word": ([0], (7, 3, 22), 16),
    "two videos, 5 + 17 words": ([5, 17], (2, 6, 7), 17),
    "two videos, 0 + 2 words": ([0, 2], (3, 5, 5), 16),
    "257 words": ([256], (1, 9, 13), 256),
    "1 word, odd sizes": ([1], (2, 9, 13), 16),
}
PLANS = ["ulysses=2", "ulysses=3", "ulysses=4", "ring=2", "ring=3", "ring=4", "ulysses=2,ring=2"]


@pytest.fixture(scope="module")
def pool():
    with MemberPool(4) as members:
        yield members


def by_threads(count, name, *arguments, **options):
    return Threads(count).run(lambda group: getattr(parallel_runs, name)(group, *arguments, **options))


@pytest.fixture(params=["processes", "threads"])
def run(request):
    if request.param == "threads":
        return by_threads
    return request.getfixturevalue("pool").run


def expected_bytes(plan, lengths, size, rank):
    """Bytes that a member sends in a float32 forward, by the formula."""
    dit = parallel_runs.HEADS_24
    plan, members = Plan.parse(plan), Plan.parse(plan).size
    counts = shares(size[0] * -(-size[1] // 2) * -(-size[2] // 2), members)
    u, r = plan.ulysses, plan.ring
    here, own = counts[rank // u * u :][:u], counts[rank]
    groups = [sum(counts[i : i + u]) for i in range(0, members, u)]
    total, same = 0, len(set(lengths)) == 1
    for words in [lengths[0]] if same else lengths:
        videos = len(lengths) if same else 1
        width, layers = dit.hidden_size_x * videos * 4, dit.depth
        there = sum(here) - own
        # q, k and v of its own tokens for the others' heads; their tokens and the text for its own heads.
        total += layers * width * (3 * own * (u - 1) + there + words * (u - 1)) // u
        sent = sum(groups) - groups[(rank // u + 1) % r] if r > 1 else 0
        total += layers * width * 2 * sent // u
    gathered = len(lengths) * 48 * 4
    return total + gathered * (own * (u - 1) + groups[rank // u] * (r - 1))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", SIZES)
def test_a_shared_forward_is_that_of_one_device(run, plan, case):
    arguments = SIZES[case]
    expected, _ = parallel_runs.denoise(None, plan, *arguments)
    results = run(Plan.parse(plan).size, "denoise", plan, *arguments)
    for rank, (velocity, sent) in enumerate(results):
        assert torch.equal(velocity, results[0][0]), "members differ"
        assert (velocity - expected).norm() / expected.norm() < 1e-6
        assert sent == expected_bytes(plan, arguments[0], arguments[1], rank)


@pytest.mark.parametrize("plan", ["ulysses=2", "ring=3", "ulysses=2,ring=2"])
@pytest.mark.parametrize("size", [(3, 6, 10), (2, 5, 9)], ids=str)
def test_noise_levels_by_frame(run, plan, size):
    """Also if a member's tokens begin and end within a frame."""
    arguments = [5, 17], size, 17, [0.0, 1.0, 0.4][: size[0]]
    expected, _ = parallel_runs.denoise(None, plan, *arguments)
    for velocity, _ in run(Plan.parse(plan).size, "denoise", plan, *arguments):
        assert (velocity - expected).norm() / expected.norm() < 1e-6


def test_shares():
    assert shares(77, 4) == [20, 19, 19, 19]
    with pytest.raises(ValueError, match=r"^3 tokens cannot be divided among 4 members; use fewer members\.$"):
        shares(3, 4)
    # 28 latent frames of 848 x 480 over 2, 4, 8 and 3; 5 over 4.
    assert [unit_of(28, 1590, members) for members in (2, 4, 8, 3)] == [1590, 1590, 795, 1590 // 2]
    assert unit_of(5, 1590, 4) == 106


PARTLY = [4.5, 1, 4.5, 1, 3.0]
RUNS = [
    (plan, scales)
    for plan in ("guidance=2", "guidance=2,ring=2", "guidance=2,ulysses=2", "ulysses=2")
    for scales in (4.5, PARTLY, 1)
    if scales != 1 or "guidance" not in plan
]


@pytest.mark.parametrize(("plan", "scales"), RUNS, ids=str)
def test_a_shared_run_is_that_of_one_device(run, plan, scales):
    expected, _, _ = parallel_runs.run(None, plan, scales=scales)
    results = run(Plan.parse(plan).size, "run", plan, scales=scales)
    for video, _, _ in results:
        assert is_the_same(video, expected, rounded="ring" in plan)


GUIDANCE = {
    "skip": Guidance(skip_blocks=(1,)),
    "nag": Guidance(nag_scale=5.0),
    "all": Guidance(skip_blocks=(1,), cfg_zero=True, nag_scale=5.0),
}


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("plan", ["guidance=2", "ulysses=3"])
def test_other_guidance_is_shared_too(run, plan, guidance):
    expected, _, _ = parallel_runs.run(None, plan, scales=PARTLY, guidance=GUIDANCE[guidance])
    for video, _, _ in run(Plan.parse(plan).size, "run", plan, scales=PARTLY, guidance=GUIDANCE[guidance]):
        assert is_the_same(video, expected)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("plan", ["guidance=2,ulysses=2", "ulysses=3"])
def test_given_frames(run, plan, held):
    clean = torch.randn(1, 12, 3, 6, 10, generator=torch.Generator().manual_seed(8))
    given = Given(clean, torch.tensor([0.0, 1.0, 0.4]), held)
    expected, _, _ = parallel_runs.run(None, plan, given=given)
    assert torch.equal(expected[:, :, 0], clean[:, :, 0]) or held
    for video, _, _ in run(Plan.parse(plan).size, "run", plan, given=given):
        assert (video - expected).norm() / expected.norm() < 1e-6


def test_given_frames_are_those_that_the_first_member_has_encoded(pool):
    expected = parallel_runs.continue_a_clip(None, None)
    for video in pool.run(2, "continue_a_clip", "guidance=2"):
        assert is_the_same(video, expected)


@pytest.mark.parametrize("plan", ["guidance=2,ulysses=2", "ulysses=2"])
def test_one_member_stops_all_after_the_same_step(run, plan):
    expected, _, _ = parallel_runs.run(None, plan, stop=2)
    for video, _, steps in run(Plan.parse(plan).size, "run", plan, stop=2):
        assert is_the_same(video, expected)
        assert steps == [0, 1, 2]


CACHES = [("first_block", 0.8), ("teacache", 0.3)]


@pytest.mark.parametrize("plan", ["guidance=2", "guidance=2,ulysses=2", "ulysses=3"])
@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_members_decide_about_the_cache_together(run, plan, cache):
    options = {"cache": cache, "scales": PARTLY}
    expected, (forwards, hits), _ = parallel_runs.run(None, plan, **options)
    assert 0 < hits < forwards
    for video, counted, _ in run(Plan.parse(plan).size, "run", plan, **options):
        assert (video - expected).norm() / expected.norm() < 1e-6
        assert counted == (forwards, hits)


def test_the_change_is_that_of_all_tokens():
    signal, reference = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))
    signal[:6] *= 3  # the members' own changes differ
    both = Threads(2).run(
        lambda group: relative_change(*(t[group.rank * 6 :][:6] for t in (signal, reference)), group.total)
    )
    assert both[0] == both[1] == pytest.approx(relative_change(signal, reference), rel=1e-6)
    assert relative_change(signal[:6], reference[:6]) > 1.2 * both[0]


def test_decisions_that_differ_are_an_error(pool):
    said = pool.run(2, "run_with_a_bent_decision", "ulysses=2")
    sentence = "Members made different block cache decisions; give all of them the same cache and video."
    assert said == [f"RuntimeError: {sentence}"] * 2


def test_members_with_other_arguments_are_refused(pool):
    sentence = r"ValueError: Members differ: schedule and guidance have the checksum \w+ on member 0, \w+ on member 1\."
    for said in pool.run(2, "run_with_own_scales", "guidance=2"):
        assert re.fullmatch(sentence, said)


def test_members_with_other_given_frames_are_refused(pool):
    sentence = r"ValueError: Members differ: the given frames have the checksum \w+ on member 0, \w+ on member 1\."
    for said in pool.run(2, "run_with_own_given_frames", "guidance=2", 0.5):
        assert re.fullmatch(sentence, said)
    (first, _, _), (second, _, _) = pool.run(2, "run_with_own_given_frames", "guidance=2", 1.0)
    assert torch.equal(first, second)


PLANNED = {
    (1, True, True): "guidance=1",
    (2, True, True): "guidance=2",
    (2, False, True): "ulysses=2",
    (3, True, True): "ulysses=3",
    (4, True, True): "guidance=2, ulysses=2",
    (4, True, False): "guidance=2, ring=2",
    (5, True, True): "ring=5",
    (8, True, True): "guidance=2, ulysses=4",
    (8, False, True): "ulysses=8",
    (16, True, True): "guidance=2, ulysses=8",
    (32, True, True): "guidance=2, ulysses=8, ring=2",
    (48, True, True): "guidance=2, ulysses=24",
}


def test_plans_are_chosen():
    for (members, guided, peers), plan in PLANNED.items():
        chosen = choose(members, guided=guided, peers=peers)
        assert str(chosen) == plan
        assert Plan.parse(plan) == chosen
        chosen.check(members)


REFUSED = {
    (6, "guidance=2,ulysses=4"): "6 GPUs: guidance=2 x ulysses=4 needs 8; use --parallel auto (guidance=2, ulysses=3).",
    (5, "ulysses=5"): "ulysses=5 does not divide Mochi's 24 heads; use 1, 2, 3, 4, 6, 8, 12 or 24, or ring=5.",
    (3, "guidance=3"): "guidance=3 is not a valid plan; guidance must be 1 or 2, ulysses and ring 1 or more.",
    (
        2,
        "guidance=two",
    ): "'guidance=two' is not a plan; use auto, or e.g. guidance=2,ulysses=4 or guidance=2,ring=2.",
    (
        1,
        "ring=1,heads=2",
    ): "'ring=1,heads=2' is not a plan; use auto, or e.g. guidance=2,ulysses=4 or guidance=2,ring=2.",
}


@pytest.mark.parametrize(("members", "plan"), REFUSED)
def test_plans_that_do_not_fit_are_refused(members, plan):
    with pytest.raises(ValueError, match=re.escape(REFUSED[members, plan])):
        Plan.parse(plan).check(members)
    with pytest.raises(
        ValueError, match=r"^guidance=2 is for steps with guidance, but there are none; .*\(ulysses=2\)\.$"
    ):
        Plan(guidance=2).check(2, guided=False)


def error_of(threads, work):
    """The error that `run` raises in its own thread: members that wait forever fail the test instead of blocking it."""
    raised = []

    def run():
        try:
            threads.run(work)
        except BaseException as error:
            raised.append(error)

    caller = threading.Thread(target=run, daemon=True)
    caller.start()
    caller.join(60)
    assert raised, "the members still wait, or have ended without an error"
    return raised[0]


@pytest.mark.parametrize(
    "error", [ValueError("broken"), KeyboardInterrupt(), torch.OutOfMemoryError("out of memory")], ids=repr
)
@pytest.mark.parametrize("count", [2, 4])
def test_what_ends_one_thread_ends_all(count, error):
    ended = []

    def work(group):
        try:
            for turn in range(100):
                if turn == 3 and group.rank == 1:
                    raise error
                group.total(torch.ones(2))
        finally:
            ended.append((group.rank, sys.exc_info()[0]))

    assert error_of(Threads(count), work) is error
    assert sorted(ended) == [(rank, type(error) if rank == 1 else Stopped) for rank in range(count)]


def test_a_member_that_does_not_come_is_an_error(monkeypatch):
    monkeypatch.setattr(group_module, "MEETING_TIMEOUT", 0.1)

    def work(group):
        time.sleep(0.5 * group.rank)
        group.total(torch.ones(2))

    with pytest.raises(Stopped, match=r"^Another member did not arrive in time\.$"):
        Threads(2).run(work)


@pytest.mark.parametrize("early", [0, 2])
def test_a_member_that_ends_early_ends_all(early):
    """Immediately, after an exchange that the others may still be reading."""

    def work(group):
        for turn in range(3):
            if turn == 1 and group.rank == early:
                return
            assert group.total(torch.ones(2)).tolist() == [3, 3]

    assert repr(error_of(Threads(3), work)) == "Stopped('Another member has already ended.')"


def test_a_member_without_a_thread_ends_all():
    def start(rank, work):
        if rank == 2:
            raise OSError("no thread")
        return group_module._start_thread(rank, work)

    ended = []

    def work(group):
        try:
            group.total(torch.ones(2))
        finally:
            ended.append((group.rank, sys.exc_info()[0]))

    with pytest.raises(OSError, match=r"^no thread$"):
        Threads(3).run(work, start)
    assert ended == [(1, Stopped)]


def test_threads_keep_nothing_of_what_they_sent():
    def work(group):
        parts = [torch.ones(3) for _ in range(2)]
        sent = [weakref.ref(part) for part in parts]
        group.exchange(parts, [(3,)] * 2)
        del parts
        return [part() for part in sent]

    assert Threads(2).run(work) == [[None, None]] * 2


def test_groups_in_a_grid():
    def work(group):
        guidance, ring, ulysses = group.grid(2, 2, 2)
        seen = [axis.total(torch.tensor(group.rank)).item() for axis in (guidance, ring, ulysses)]
        return seen, (guidance.rank, ring.rank, ulysses.rank), group.broadcast(torch.tensor(group.rank), 3).item()

    for rank, (seen, places, third) in enumerate(Threads(8).run(work)):
        assert places == (rank // 4, rank // 2 % 2, rank % 2)
        assert seen == [2 * (rank % 4) + 4, 2 * rank + 2 - 4 * places[1], 2 * rank + 1 - 2 * places[2]]
        assert third == 3


def test_a_group_of_one_gives_what_it_gets():
    group, x = Alone(), torch.arange(3)
    assert torch.equal(group.total(x), x) and torch.equal(group.gather(x)[0], x) and group.sent == 0
    assert Members.of(group, Plan()).tokens.size == 1


@pytest.mark.parametrize("limit", [None, 1], ids=["one round", "rounds"])
@pytest.mark.parametrize("latents", [1, 2, 4, 5, 7, 9])
@pytest.mark.parametrize("members", [2, 4])
def test_a_decoder_shared_out_in_time(run, members, latents, limit):
    """Also with one frame or none for a member, and with two videos."""
    z = torch.randn(1 + (latents == 4), 12, latents, 4, 6, generator=torch.Generator().manual_seed(latents))
    expected, _ = parallel_runs.decode(None, z)
    for video, _ in run(members, "decode", z, memory_limit=limit):
        assert (video - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())


def test_over_a_border_go_two_frames_for_each_convolution(run):
    z = torch.randn(1, 12, 6, 4, 6, generator=torch.Generator().manual_seed(0))
    (video, first), (_, second) = run(2, "decode", z)
    widths, pixels = VAE.decoder_channels, [4 * 6 * scale**2 for scale in (1, 2, 4, 8)]
    # Blocks of two convolutions: two blocks at the first size, one at each of the others.
    border = sum(blocks * 2 * 2 * w * size * 4 for blocks, w, size in zip((2, 1, 1, 1), widths, pixels, strict=True))
    room = 8  # a number: for how many frames there is room
    assert first == border + video[:, :, :13].numel() * 4 + room
    assert second == video[:, :, 13:].numel() * 4 + room


def test_rounds_of_a_decoder():
    assert rounds_of(28, 2, 14) == [[14, 14]]
    assert rounds_of(28, 4, 3) == [[3, 3, 2, 2], [3, 2, 2, 2], [3, 2, 2, 2]]
    assert rounds_of(5, 8, 0) == [[1, 1, 1, 1, 1, 0, 0, 0]]


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    parallel_runs.write_forms(folder)
    return folder


@pytest.mark.parametrize("form", [*sorted(QUANTIZERS), "lora", "streamed"])
def test_other_forms_of_the_weights_are_shared_too(pool, forms, form):
    expected, _, _ = parallel_runs.run_in_form(None, "ulysses=2", forms, form)
    for video, _, _ in pool.run(2, "run_in_form", "ulysses=2", forms, form):
        # If sums differ, values rounded to 8 bits may fall on the neighbouring number, and so may everything after them.
        assert is_the_same(video, expected, limit=0.1 if form == "fp8_rowwise" else 2e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("new_compiler")
def test_compiled_blocks_are_shared_too(pool, forms):
    """In full graphs, in which the attention of all members is one operation."""
    expected, _, _ = parallel_runs.run_in_form(None, "ulysses=2", forms, "plain", scales=1)
    for video, _, _ in pool.run(2, "run_in_form", "ulysses=2", forms, "compiled", scales=1, timeout=60):
        assert (video - expected).norm() / expected.norm() < 1e-5
