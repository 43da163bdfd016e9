"""Which common tests of Transformers are replaced by our own, and which it does not publish; each with the reason."""

# Name of the test to the reason; `stand_ins.Suite` refuses a suite that replaces any other.
OVERRIDES: dict[str, str] = {}

NOT_IN_THE_DISTRIBUTION = {
    "GenerationTesterMixin": "tests/generation/ is not in the source distribution; "
    "tests/defocus_mllm/test_generation.py has our own checks",
    "ExportTesterMixin": "tests/exporters/ is not in the source distribution",
}
