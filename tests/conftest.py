"""What the tests of scripts and benchmarks share."""

import pytest


@pytest.fixture
def refused(capsys):
    """refused(script, flags, part): the script ends with code 2 and one complaint, which holds `part`."""
    def run(script, flags, part):
        with pytest.raises(SystemExit) as end:
            script.run_script(script.main, script.parse_args([str(flag) for flag in flags]))
        error = capsys.readouterr().err
        complaints = [line for line in error.splitlines() if "error: " in line]
        assert end.value.code == 2 and len(complaints) == 1 and "Traceback" not in error, error
        assert part in complaints[0]

    return run
