"""The plugin in projects that use it, and in projects that do not."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

README = Path(__file__).parents[2] / "README.md"
(EXAMPLE,) = (
    block for block in re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    if "def gelu_forward" in block
)  # fmt: skip
STRICT = ["-p", "no:cacheprovider", "-W", "error", "--strict-markers", "--strict-config"]


@pytest.fixture
def run(pytester):
    """Run a test module, in this process: the plugin is loaded by its entry point."""

    def run(text, *options, conftest=""):
        pytester.makepyfile(test_it=text, **({"conftest": conftest} if conftest else {}))
        return pytester.runpytest_inprocess(*STRICT, "-v", *options)

    return run


def own_lines(result_lines):
    """What the plugin printed; the name stands in other lines too, in the path of a clone say."""
    return [line for line in result_lines if line.startswith("gpubn: ")]


BOTH = """
import gpubn

def test_both(device, xp):
    assert device.xp is xp
    assert gpubn.current() == gpubn.backend.resolve(device.name)
    assert gpubn.backend.place(xp.ones(3)) == device.name

def test_one(xp): pass

def test_none(): pass
"""


@pytest.mark.usefixtures("two_devices")
class TestTwoDevices:
    def test_each_test_runs_on_each_device(self, run):
        result = run(BOTH)
        result.assert_outcomes(passed=5)
        result.stdout.fnmatch_lines(
            [
                "test_it.py::test_both?cpu? PASSED*",
                "test_it.py::test_both?cuda:0? PASSED*",
                "test_it.py::test_one?cpu? PASSED*",
                "test_it.py::test_one?cuda:0? PASSED*",
                "test_it.py::test_none PASSED*",
            ]
        )
        assert own_lines(result.outlines) == []

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["cpu"], ["cpu"]),
            (["cuda"], ["cuda:0"]),
            (["cuda:0,cpu"], ["cuda:0", "cpu"]),
            (["cpu", "cuda", "cuda:0"], ["cpu", "cuda:0"]),
            (["auto"], ["cpu", "cuda:0"]),
            (["all"], ["cpu", "cuda:0"]),
        ],
    )
    def test_the_command_line_chooses(self, run, options, expected):
        result = run("def test_it(device): pass", *(f"--gpubn-device={word}" for word in options))
        result.assert_outcomes(passed=len(expected))
        result.stdout.fnmatch_lines([f"gpubn: devices {', '.join(expected)}"])
        ran = [line.split("[")[1].split("]")[0] for line in result.outlines if "PASSED" in line]
        assert ran == expected

    def test_the_device_is_in_force_for_the_tests_length_only(self, run):
        text = """
        import gpubn, pytest

        def test_first(device):
            seen.append(gpubn.current().name)

        def test_last():
            assert seen == ["cpu", "cuda:0"]
            assert gpubn.backend._current.get() is before

        seen, before = [], gpubn.backend._current.get()
        """
        run(text).assert_outcomes(passed=3)

    def test_a_fixture_of_ones_own_may_build_on_it(self, run):
        text = """
        import pytest

        @pytest.fixture
        def x(xp):
            return xp.ones(3)

        @pytest.fixture
        def device(device):
            return device.name

        def test_x(x): pass

        def test_device(device): assert device in ("cpu", "cuda:0")

        @pytest.mark.usefixtures("xp")
        def test_marked(): pass
        """
        run(text).assert_outcomes(passed=6)

    def test_the_readmes_example(self, pytester):
        pytester.makepyfile(test_gelu=EXAMPLE)
        result = pytester.runpytest_inprocess(*STRICT)
        result.assert_outcomes(passed=5)

    @pytest.mark.parametrize(
        ("right", "wrong", "failure"),
        [
            ("3 * CUBIC", "2 * CUBIC", "AssertionError: the gradient of input 0 is wrong"),
            (
                "(1 + t), (",
                "(1 + t + 1e-6 * (namespace(x) is not np)), (",
                "gelu_forward gives diff",
            ),
            ("0.5 * x *", "x *", r"assert \[.*40.0\] == \[.*20.0\]"),
        ],
    )
    def test_the_readmes_example_sees_what_is_wrong(self, pytester, right, wrong, failure):
        text = EXAMPLE
        assert text.count(right) == 1
        pytester.makepyfile(test_gelu=text.replace(right, wrong))
        result = pytester.runpytest_inprocess(*STRICT)
        assert result.ret == pytest.ExitCode.TESTS_FAILED
        result.stdout.re_match_lines([f".*{failure}"])


@pytest.mark.usefixtures("no_cuda")
class TestOneDevice:
    def test_the_cpu_and_the_reason(self, run):
        result = run(BOTH)
        result.assert_outcomes(passed=3)
        result.stdout.fnmatch_lines(
            ["gpubn: 'device' and 'xp' are the CPU only, no NVIDIA driver was found"]
        )

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("cuda", "CUDA cannot be used: no NVIDIA driver was found; device 'cpu'*"),
            ("cpu,cuda:0", "CUDA cannot be used: no NVIDIA driver was found; *"),
            ("all", "CUDA cannot be used: no NVIDIA driver was found; *"),
            ("gpu", "device is 'gpu', expected *"),
            ("", "device is '', expected *"),
        ],
    )
    @pytest.mark.parametrize("text", [BOTH, "def test_none(): pass"])
    def test_a_device_that_is_not_there_is_an_error_at_the_start(self, run, word, message, text):
        result = run(text, f"--gpubn-device={word}", "-qq")  # no header: it asks as well
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines([f"ERROR: --gpubn-device {word}: {message}"])
        result.stdout.no_fnmatch_line("test_it.py::*")

    def test_the_readmes_example_warns(self, pytester):
        pytester.makepyfile(test_gelu=EXAMPLE)
        result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-W", "default")
        result.assert_outcomes(passed=3, warnings=1)
        result.stdout.fnmatch_lines(["*NoSecondDevice: gelu_forward ran on cpu only, no NVIDIA *"])

    def test_asking_for_it_while_a_test_runs_is_an_error_that_says_so(self, run):
        result = run("def test_it(request): request.getfixturevalue('xp')")
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines(["*expected among the arguments of a test or fixture"])


@pytest.mark.usefixtures("two_devices")
class TestStaysOutOfTheWay:
    """With two devices, a test that the plugin takes for its own would run twice."""

    @pytest.mark.parametrize(
        ("conftest", "ids"),
        [
            (
                """
                import pytest

                @pytest.fixture(params=["a", "b"])
                def device(request): return request.param
                """,
                ["a", "b"],
            ),
            (
                """
                import pytest

                @pytest.fixture
                def device(): return "a"
                """,
                None,
            ),
            (
                """
                def pytest_generate_tests(metafunc):
                    if "device" in metafunc.fixturenames:
                        metafunc.parametrize("device", ["a", "b"])
                """,
                ["a", "b"],
            ),
            (
                """
                import pytest

                def pytest_generate_tests(metafunc):
                    if "device" in metafunc.fixturenames:
                        metafunc.parametrize("device", ["a", "b"], indirect=True)

                @pytest.fixture
                def device(request): return request.param
                """,
                ["a", "b"],
            ),
        ],
        ids=["params", "fixture", "values", "indirect"],
    )
    def test_a_projects_own_device(self, run, conftest, ids):
        result = run("def test_it(device): assert device in ('a', 'b')", conftest=conftest)
        ran = [line.split(" ")[0] for line in result.outlines if "PASSED" in line]
        assert ran == [f"test_it.py::test_it{f'[{i}]' if i else ''}" for i in ids or [None]]

    def test_a_marker_of_ones_own_values(self, run):
        text = """
        import pytest

        @pytest.mark.parametrize("device", ["a", "b"])
        def test_it(device): assert device in ("a", "b")

        @pytest.mark.parametrize("device", ["a", "b"])
        def test_xp_is_still_the_plugins(device, xp): assert device in ("a", "b")
        """
        run(text).assert_outcomes(passed=2 + 4)

    def test_values_for_device_leave_xp_to_the_plugin(self, run):
        conftest = """
        def pytest_generate_tests(metafunc):
            metafunc.parametrize("device", ["a", "b"])
        """
        result = run("def test_it(device, xp): assert xp.ones(3).sum() == 3", conftest=conftest)
        result.assert_outcomes(passed=4)

    def test_not_one_word_where_it_is_not_used(self, run):
        result = run("def test_it(): pass")
        result.assert_outcomes(passed=1)
        assert own_lines(result.outlines) == []


def test_a_project_without_it_pays_for_no_numba_cupy_or_probe(pytester):
    pytester.makepyfile(
        test_it="""
        import sys

        def test_it():
            assert "gpubn.testing.plugin" in sys.modules  # by its entry point
            heavy = {"cupy", "numba", "gpubn.kernels", "gpubn.layers", "gpubn.train"}
            assert not heavy & sys.modules.keys()
            assert not sys.modules["gpubn.backend"]._probes
        """
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", *STRICT, "test_it.py"],
        cwd=pytester.path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert own_lines(done.stdout.splitlines()) == []
