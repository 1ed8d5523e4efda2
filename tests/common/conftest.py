def pytest_configure(config):
    """The markers of Transformers' own tests."""
    for name in ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "generate"):
        config.addinivalue_line("markers", f"{name}: of Transformers' common tests")
    for name in ("is_staging_test", "not_device_test", "torch_compile_test", "torch_export_test"):
        config.addinivalue_line("markers", f"{name}: of Transformers' common tests")
