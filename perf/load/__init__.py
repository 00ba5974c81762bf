"""Load tests with perf_analyzer."""
