"""Which common tests of Transformers are replaced by our own, and which it does not publish; each with the reason."""

# Name of the test to the reason; `stand_ins.Suite` refuses a suite that replaces any other.
OVERRIDES = {
    "test_model_get_set_embeddings": "(encoder) it wants an nn.Embedding; what embeds patches is a convolution, as in "
    "all vision models of Transformers, which override this test too",
    "test_new_models_require_torchvision_backend": "(image processor) a policy for models inside Transformers; this "
    "project does without torchvision",
}

# What is not replaced, but given other inputs.
ADAPTED = {
    "ids_tensor": "random words are never the image placeholder: without an image our models refuse it",
}

NOT_IN_THE_DISTRIBUTION = {
    "GenerationTesterMixin": "tests/generation/ is not in the source distribution",
    "ExportTesterMixin": "tests/exporters/ is not in the source distribution",
}
