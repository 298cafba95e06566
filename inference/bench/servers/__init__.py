"""`manage.py bench_engine`: llmsite beside llama.cpp's own server and llama-cpp-python's, with a real model, over HTTP.

    workloads (what is asked) --study (rounds, one side at a time)--> streams (the clients) --> verdicts --> report

The servers are real processes on loopback; nothing here is imported by the web or the worker.
"""
