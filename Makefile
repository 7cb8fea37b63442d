# For any make.  There is nothing to build: one file is the program.

PYTHON = python3
DESTDIR =
PREFIX = /usr/local
BINDIR = $(PREFIX)/bin
LIBDIR = $(PREFIX)/lib/qmail-remote
MANDIR = $(PREFIX)/share/man
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
	@echo 'make install-qmail'
	@echo '                the same, and puts it in the place of qmail-remote'
	@echo '                in QMAIL_HOME/bin; the old one is saved there'
	@echo 'make install-qmail-rspawn'
	@echo '                the same for qmail-rspawn: qmail then delivers'
	@echo '                from processes that stay alive; needs a restart'
	@echo 'make uninstall  undoes all three'
	@echo 'make deb        a Debian package'
	@echo 'make qmail-remote.8'
	@echo '                the manual page'
	@echo 'make clean      removes what a run without -B left behind'
	@echo 'PYTHON=python3.12 takes another Python; install also knows DESTDIR,'
	@echo 'PREFIX, BINDIR, LIBDIR, MANDIR and QMAIL_HOME.'

# -B: leave no __pycache__.
check:
	@$(PYTHON) -B test_qmail_remote.py check

demo:
	@$(PYTHON) -B test_qmail_remote.py demo

# make fuzz SECONDS=600 SEED=7; more words in the docstring of fuzz().
SECONDS = 60
fuzz:
	@SECONDS='$(SECONDS)' SEED='$(SEED)' \
	    $(PYTHON) -B test_qmail_remote.py fuzz

bench:
	@PEER='$(PEER)' $(PYTHON) -B test_qmail_remote.py bench

# The manual in the program is its only source.
qmail-remote.8: qmail_remote.py test_qmail_remote.py
	$(PYTHON) -B test_qmail_remote.py manual >qmail-remote.8.new
	mv qmail-remote.8.new qmail-remote.8

# The installed file names its interpreter by an absolute path, and has been
# run by it before it takes the place of another.  The bytecode is only for
# this very file (time and size) and this very Python; without docstrings and
# columns, which nobody sees, it loads in 0.1 ms less.  umask: qmailr has to
# reach all of it, and qmail bounces mail if it cannot.
install:
	umask 022; mkdir -p '$(DESTDIR)$(BINDIR)' '$(DESTDIR)$(LIBDIR)'
	umask 022; \
	python=$$($(PYTHON) -ISc 'import sys; print(sys.executable)') && \
	here=$$(pwd) && cd '$(DESTDIR)$(LIBDIR)' && \
	case "$$python" in \
	/*) ;; \
	*) echo "$(PYTHON) does not say where it is." >&2; exit 1 ;; \
	esac && \
	sed -e "s|^LC_ALL=C python3 |LC_ALL=C $$python |" \
	    -e 's|^QMAIL_HOME = .*|QMAIL_HOME = b"$(QMAIL_HOME)"|' \
	    "$$here/qmail_remote.py" >qmail_remote.new && \
	chmod 755 qmail_remote.new && \
	{ ./qmail_remote.new </dev/null | grep '^DI (qmail-remote)' >/dev/null || \
	    { echo "$$python cannot run it; nothing is changed." >&2; \
	    rm qmail_remote.new; exit 1; }; } && \
	mv qmail_remote.new qmail_remote.py && \
	mkdir -p __pycache__ && chmod 755 __pycache__ && \
	"$$python" -X no_debug_ranges -ISc 'import importlib.util as u, \
	    py_compile as c; f = "qmail_remote.py"; c.compile(f, \
	    u.cache_from_source(f), "$(LIBDIR)/" + f, True, 2)' && \
	chmod 644 __pycache__/qmail_remote.*
	ln -sf '$(LIBDIR)/qmail_remote.py' '$(DESTDIR)$(BINDIR)/qmail_remote.py'
	umask 022; page='$(DESTDIR)$(MANDIR)/man8/qmail_remote.py.8'; \
	mkdir -p '$(DESTDIR)$(MANDIR)/man8' && \
	$(PYTHON) -B test_qmail_remote.py manual >"$$page.new" && \
	chmod 644 "$$page.new" && mv "$$page.new" "$$page"
	@echo 'Now let qmailr run it, before qmail does: README, section 3.'

# In the place of qmail's own program, by rename: a delivery finds the one or
# the other, for qmail bounces mail if there is none.  What is ours already,
# under whatever PREFIX, is not saved over the old one.  qmailr runs it first.
install-qmail: install
	@program=qmail-remote; $(REPLACE)

install-qmail-rspawn: install
	@program=qmail-rspawn; $(REPLACE) && \
	echo 'qmail-send uses it when qmail is started again.'

REPLACE = umask 022; link='$(LIBDIR)/qmail_remote.py'; \
	cd '$(DESTDIR)$(QMAIL_HOME)/bin' || exit 1; \
	if [ -z '$(DESTDIR)' ] && [ "$$(uname)" = Linux ] && \
	    [ "$$(id -u)" = 0 ] && id qmailr >/dev/null 2>&1; then \
	    su -s /bin/sh qmailr -c "'$$link'" </dev/null | \
	        grep '^DI (qmail-remote)' >/dev/null || \
	        { echo "qmailr cannot run $$link; nothing is changed." >&2; \
	        exit 1; }; \
	fi; \
	rm -f $$program.new $$program.classic.new && \
	if [ -e $$program ] && \
	    ! grep '^LC_ALL=C .* -ISB -X under_sh ' $$program >/dev/null; then \
	    cp -p $$program $$program.classic.new && \
	    mv $$program.classic.new $$program.classic; \
	fi && \
	ln -s "$$link" $$program.new && mv $$program.new $$program && \
	echo "$$(pwd)/$$program is now a link to $$link."

# First the old programs come back, then ours goes.
uninstall:
	@link='$(LIBDIR)/qmail_remote.py'; \
	for program in qmail-remote qmail-rspawn; do \
	    if cd '$(DESTDIR)$(QMAIL_HOME)/bin' 2>/dev/null && \
	        [ "$$(readlink $$program)" = "$$link" ]; then \
	        if [ -e $$program.classic ]; then \
	            mv $$program.classic $$program && \
	            echo "$$(pwd)/$$program is the old one again."; \
	        else \
	            rm $$program && \
	            echo "$$(pwd)/$$program is gone; there was none before."; \
	        fi; \
	    fi; \
	done
	rm -f '$(DESTDIR)$(MANDIR)/man8/qmail_remote.py.8'
	rm -f '$(DESTDIR)$(BINDIR)/qmail_remote.py'
	rm -rf '$(DESTDIR)$(LIBDIR)'

# A quick proof, with nothing but dpkg-deb.  The bytecode is made where the
# package is installed, for the Python there.
DEBPYTHON = /usr/bin/python3
DEB = deb.new/DEBIAN
deb:
	rm -rf deb.new
	$(MAKE) install DESTDIR="$$(pwd)/deb.new" PREFIX=/usr \
	    PYTHON='$(DEBPYTHON)'
	rm -rf deb.new/usr/lib/qmail-remote/__pycache__
	gzip -9n deb.new/usr/share/man/man8/qmail_remote.py.8
	umask 022; mkdir -p $(DEB) deb.new/usr/share/doc/qmail-remote-py
	umask 022; cp README deb.new/usr/share/doc/qmail-remote-py/README
	umask 022; cp LICENSE deb.new/usr/share/doc/qmail-remote-py/copyright
	umask 022; version=$$(sed -n "s/^VERSION = '\(.*\)'/\1/p" \
	    qmail_remote.py) && \
	printf '%s\n' 'Package: qmail-remote-py' "Version: $$version" \
	    'Architecture: all' 'Section: mail' 'Priority: optional' \
	    'Maintainer: the qmail_remote.py authors <postmaster@localhost>' \
	    'Depends: python3 (>= 3.6)' 'Recommends: ca-certificates' \
	    'Description: drop-in qmail-remote in one Python file' \
	    ' Sends mail via SMTP for qmail, with TLS, passwords and IPv6.' \
	    ' It is not used until QMAILREMOTE or a link says so.' \
	    >$(DEB)/control && \
	printf '%s\n' '#!/bin/sh' 'set -e' 'umask 022' \
	    '/usr/bin/python3 -X no_debug_ranges -ISc "' \
	    'import importlib.util as u, py_compile as c' \
	    'f = \"/usr/lib/qmail-remote/qmail_remote.py\"' \
	    'c.compile(f, u.cache_from_source(f), f, True, 2)"' \
	    >$(DEB)/postinst && \
	printf '%s\n' '#!/bin/sh' 'set -e' \
	    'rm -rf /usr/lib/qmail-remote/__pycache__' >$(DEB)/prerm && \
	chmod 755 $(DEB)/postinst $(DEB)/prerm && \
	dpkg-deb --root-owner-group --build deb.new \
	    "qmail-remote-py_$${version}_all.deb"
	rm -rf deb.new

clean:
	rm -rf __pycache__ qmail-remote.8 qmail-remote.8.new deb.new
	rm -f qmail-remote-py_*_all.deb

.PHONY: help check demo fuzz bench install install-qmail \
	install-qmail-rspawn uninstall deb clean
