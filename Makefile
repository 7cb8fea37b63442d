# For any make.  There is nothing to build: one file is the program.

PYTHON = python3

help:
	@echo 'make demo    five deliveries, shown step by step: no root,'
	@echo '             no network, no qmail needed'
	@echo 'make check   all tests'
	@echo 'make clean   removes what a run without -B left behind'
	@echo 'make demo PYTHON=pypy3 takes another Python.'

# -B: leave no __pycache__.
check:
	$(PYTHON) -B test_qmail_remote.py

demo:
	@$(PYTHON) -B test_qmail_remote.py demo

clean:
	rm -rf __pycache__

.PHONY: help check demo clean
