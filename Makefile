# For any make.  There is nothing to build: one file is the program.

PYTHON = python3
DESTDIR =
PREFIX = /usr/local
BINDIR = $(PREFIX)/bin
LIBDIR = $(PREFIX)/lib/qmail-remote
QMAIL_HOME = /var/qmail

help:
	@echo 'make demo       deliveries shown step by step: no root, no'
	@echo '                network, no qmail needed'
	@echo 'make check      all tests'
	@echo 'make fuzz       random servers, DNS answers, messages, files;'
	@echo '                SECONDS=600 SEED=7'
	@echo 'make bench      figures; PEER=/var/qmail/bin/qmail-remote adds'
	@echo '                that program'
	@echo 'make install    as root: the program with its bytecode, which'
	@echo '                starts in a third of the time, beside any qmail'
	@echo 'make uninstall  undoes that'
	@echo 'make clean      removes what a run without -B left behind'
	@echo 'PYTHON=pypy3 takes another Python; install also knows DESTDIR,'
	@echo 'PREFIX, BINDIR, LIBDIR and QMAIL_HOME.'

# -B: leave no __pycache__.
check:
	$(PYTHON) -B test_qmail_remote.py

demo:
	@$(PYTHON) -B test_qmail_remote.py demo

# make fuzz SECONDS=600 SEED=7; more words in the docstring of fuzz().
SECONDS = 60
fuzz:
	@SECONDS='$(SECONDS)' SEED='$(SEED)' \
	    $(PYTHON) -B test_qmail_remote.py fuzz

bench:
	@PEER='$(PEER)' $(PYTHON) -B test_qmail_remote.py bench

# The installed file names its interpreter by an absolute path, and has been
# run by it before it takes the place of another.  The bytecode is only for
# this very file (time and size) and this very Python.  umask: qmailr has to
# reach all of it, and qmail bounces mail if it cannot.
install:
	umask 022; mkdir -p '$(DESTDIR)$(BINDIR)' '$(DESTDIR)$(LIBDIR)'
	umask 022; \
	python=$$($(PYTHON) -ISc 'import sys; print(sys.executable)') && \
	here=$$(pwd) && cd '$(DESTDIR)$(LIBDIR)' && case "$$python" in /*) ;; *) exit 1 ;; esac && \
	sed -e "s|^LC_ALL=C python3 |LC_ALL=C $$python |" \
	    -e 's|^QMAIL_HOME = .*|QMAIL_HOME = b"$(QMAIL_HOME)"|' \
	    "$$here/qmail_remote.py" >qmail_remote.new && \
	chmod 755 qmail_remote.new && \
	./qmail_remote.new </dev/null | grep '^DI (qmail-remote)' >/dev/null && \
	mv qmail_remote.new qmail_remote.py && \
	mkdir -p __pycache__ && chmod 755 __pycache__ && \
	"$$python" -ISc 'import py_compile as c; c.compile("qmail_remote.py", \
	    dfile="$(LIBDIR)/qmail_remote.py", doraise=True)' && \
	chmod 644 __pycache__/qmail_remote.*
	ln -sf '$(LIBDIR)/qmail_remote.py' '$(DESTDIR)$(BINDIR)/qmail_remote.py'
	@echo 'Now let qmailr run it, before qmail does: README, section 3.'

uninstall:
	rm -f '$(DESTDIR)$(BINDIR)/qmail_remote.py'
	rm -rf '$(DESTDIR)$(LIBDIR)'

clean:
	rm -rf __pycache__

.PHONY: help check demo fuzz bench install uninstall clean
