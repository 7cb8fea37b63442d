# For any make.  There is nothing to build: one file is the program.

PYTHON = python3
DESTDIR =
PREFIX = /usr/local
BINDIR = $(PREFIX)/bin
LIBDIR = $(PREFIX)/lib/qmail-remote
MANDIR = $(PREFIX)/share/man
# Empty: the one that the installed file names, else /var/qmail.
QMAIL_HOME =

help:
	@echo 'make demo       deliveries shown step by step: no root, no'
	@echo '                network, no qmail needed'
	@echo 'make check      all tests'
	@echo 'make lint       ruff, mypy and vermin, where they are installed'
	@echo 'make coverage   all tests, and what they miss; needs coverage.py'
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

# A finding is mended, or has a "noqa" with its reason, but for these.  B904:
# an exception ends as a report or in a test, and no traceback shows what it
# came from.  PLW1641: what has __eq__ alone has no hash, as meant.  PLW2901: a
# loop may work on its own name.  In the tests, B023: functions that are used
# up in their round of the loop; C901: a long script is simple; PLW1509,
# PLW1510: they use preexec_fn where there are no threads, and look at the exit
# status themselves.  mypy reads functions without annotations, too, and need
# not be told what an empty list is for.  vermin: the program needs no Python
# later than 3.6.  A tool that is not installed is left out, unless
# LINTERS=required.
lint:
	@bad=0; lint() { \
	    if command -v "$$1" >/dev/null; then \
	        echo "$$1:"; "$$@" || bad=1; \
	    else \
	        echo "$$1 is not installed"; \
	        [ "$$LINTERS" != required ] || bad=1; \
	    fi; }; \
	lint ruff check --isolated --no-cache --target-version py37 \
	    --output-format concise --line-length 79 \
	    --select E,F,W,B,PLW,C901 --ignore B904,PLW1641,PLW2901 \
	    --config lint.mccabe.max-complexity=12 --per-file-ignores \
	    'test_*:B023,test_*:C901,test_*:PLW1509,test_*:PLW1510' \
	    qmail_remote.py test_qmail_remote.py; \
	lint mypy --cache-dir=/dev/null --check-untyped-defs \
	    --disable-error-code var-annotated qmail_remote.py; \
	lint vermin --no-tips --violations -t=3.6- qmail_remote.py; \
	exit $$bad

# Lines and branches of the program that the tests reach, in all processes.
coverage:
	@$(PYTHON) -B test_qmail_remote.py coverage

demo:
	@$(PYTHON) -B test_qmail_remote.py demo

# make fuzz SECONDS=600 SEED=7; more words in the docstring of fuzz().
SECONDS = 60
fuzz:
	@SECONDS='$(SECONDS)' SEED='$(SEED)' \
	    $(PYTHON) -B test_qmail_remote.py fuzz

bench:
	@PEER='$(PEER)' $(PYTHON) -B test_qmail_remote.py bench

# The manual in the program is its only source.  A paragraph that holds
# examples keeps its lines.
AWK = awk
PAGE = sed -n '/^r"""/,/^"""/{ /^r*"""/d; p; }' \
	qmail_remote.py | sed -e 's/\\/\\e/g' -e 's/-/\\-/g' \
	-e "s/'/\\\\(aq/g" -e 's/`/\\(ga/g' -e 's/\^/\\(ha/g' \
	-e 's/~/\\(ti/g' -e 's/^    \./    \\\&./' | \
	$(AWK) 'BEGIN { RS = ""; FS = "\n"; \
	    print ".TH QMAIL-REMOTE 8 2026-11-24 qmail_remote.py" } \
	{ heading = $$1 !~ /^ /; keep = ("\n" $$0) ~ /\n     /; \
	    print heading ? ".SH " $$1 : ".PP"; \
	    if (keep) print ".nf"; \
	    for (i = 1 + heading; i <= NF; i++) \
	        if ($$i != "") print substr($$i, 5); \
	    if (keep) print ".fi" }'

qmail-remote.8: qmail_remote.py
	$(PAGE) >qmail-remote.8.new
	mv qmail-remote.8.new qmail-remote.8

# Arguments: a source, where it will be, and what it calls itself.  Bytecode
# without docstrings and columns, which nobody sees, loads in 0.1 ms less.
COMPILE = import importlib.util as u, py_compile as c, sys; \
	source, place, name = sys.argv[1:]; \
	c.compile(source, u.cache_from_source(place), name, True, 2)

# Runs a command as qmail would: as qmailr (or, where there is no such user,
# as somebody without rights), in no other group, with no environment.
# Arguments: user id, group id, command.
AS_QMAILR = import os, sys; uid, gid = map(int, sys.argv[1:3]); \
	os.chdir("/"); os.setgroups([gid]); os.setgid(gid); os.setuid(uid); \
	os.execve(sys.argv[3], sys.argv[3:], {})

# Reads the files for TLS as deliveries do, and gives them to OpenSSL if this
# Python has it.  Each name is printed first: the last one is to blame if this
# fails.  Arguments: the directory of the program, then each file in tlshosts
# and notlshosts.
TLS_FILES = import os, sys; sys.path.insert(0, sys.argv[1]); \
	import qmail_remote as q; q.enter_home(); Policy = q.TlsPolicy; \
	usual = Policy(Policy.IF_OFFERED, None), Policy(Policy.SYSTEM, None); \
	read = lambda name: os.write(1, name + b"\n") and \
	    q.read_control_file(name); \
	use = lambda control, *policies: q.trust_store() and \
	    [q.tls_context(policy, control) for policy in policies]; \
	ciphers = q.first_line(read(b"tlsclientciphers") or b""); \
	use(q.TlsControl(None, False, None, ciphers), *usual); \
	read(b"clientcert.pem"); control = q.read_tls_defaults(); \
	use(control, *usual); \
	[use(control, Policy(Policy.FILE, data)) \
	    for name in map(os.fsencode, sys.argv[2:]) for data in [read(name)] \
	    if name.startswith(b"tlshosts/") and data is not None]

# Prints the qmail home that a file names.
HOME_IN = sed -n "s/^QMAIL_HOME = b*\"\(.*\)\".*/\1/p"

# leads PATH: whether it is a link to our file.  $root: before all paths, where
# a package is built; $lib and $bin: where our file will be, and its link.
LEADS = leads() { [ -L "$$1" ] && \
	[ "$$1" != "$$root$$bin/qmail_remote.py" ] || return 1; \
	case $$(readlink "$$1") in \
	"$$lib/qmail_remote.py" | "$$bin/qmail_remote.py") ;; \
	*) [ "$$1" -ef "$$root$$lib/qmail_remote.py" ] ;; esac; }

# The installed file names its interpreter by an absolute path, and its qmail
# home.  It keeps that home as long as a link there leads to it: uninstall
# finds such links only where the file says.  All that can go wrong is tried on
# the new file, in a directory of its own, before it takes the place of another
# by rename: whether qmailr can run it (qmail bounces mail if not); if qmail is
# to use it ($program), or does so already, whether the control files are good;
# whether the old program can be saved.  The bytecode is only for this very
# file (time and size) and this very Python.
INSTALL = umask 022; root='$(DESTDIR)'; lib='$(LIBDIR)'; bin='$(BINDIR)'; \
	page='$(DESTDIR)$(MANDIR)/man8/qmail_remote.py.8'; \
	file=$$lib/qmail_remote.py; new=$$root$$lib/qmail_remote.new; \
	was=$$($(HOME_IN) "$$root$$file" 2>/dev/null) || :; \
	home='$(QMAIL_HOME)'; home=$${home:-$${was:-/var/qmail}}; \
	old=$$root$$home/bin/$$program; $(LEADS); \
	ours='Copyright (c) 2026 the qmail_remote.py authors'; \
	refuse() { rm -rf "$$new"; echo "$$1; nothing is changed." >&2; \
	    exit 1; }; \
	try() { if [ "$$uid" ]; then \
	        "$$python" -ISc '$(AS_QMAILR)' $$uid $$gid "$$@"; \
	    else env - "$$@"; fi </dev/null 2>/dev/null; }; \
	case "$$lib $$home" in /*' '/*) ;; \
	*) refuse 'LIBDIR and QMAIL_HOME must begin with /' ;; esac; \
	python=$$($(PYTHON) -ISc 'import sys; print(sys.executable)') || :; \
	case "$$python" in /*) ;; \
	*) refuse '$(PYTHON) does not say where it is' ;; esac; \
	uid=; gid=; user=you; \
	if [ -z '$(DESTDIR)' ] && [ "$$(id -u)" = 0 ]; then \
	    user=qmailr; uid=$$(id -u qmailr 2>/dev/null) && \
	    gid=$$(id -g qmailr) || { uid=65534; gid=65534; \
	    user='a user without rights, such as qmailr,'; }; \
	    try /bin/sh -c : || { uid=; user=you; }; fi; \
	if [ "$$program" ] && [ ! -d "$$root$$home/bin" ]; then \
	    refuse "There is no $$root$$home/bin"; fi; \
	[ -z "$$was" ] || [ "$$root$$was" -ef "$$root$$home" ] || \
	    for link in "$$root$$was"/bin/*; do ! leads "$$link" || \
	        refuse "$$link is a link to $$file, and would get another home: \
	give another PREFIX for $$home, or make uninstall first"; done; \
	rm -rf "$$new"; \
	mkdir -p "$$new" "$$root$$bin" "$${page%/*}" && $(PAGE) >"$$new/page" && \
	sed -e "s|^LC_ALL=C python3 |LC_ALL=C $$python |" \
	    -e 's|^QMAIL_HOME = .*|QMAIL_HOME = b"'"$$home"'"|' \
	    qmail_remote.py >"$$new/qmail_remote.py" && \
	chmod 755 "$$new/qmail_remote.py" && chmod 644 "$$new/page" || \
	    refuse "Cannot write to $$root$$lib"; \
	try "$$new/qmail_remote.py" | grep '^DI (qmail-remote)' >/dev/null || \
	    refuse "With $$python $$user cannot run it"; \
	used=$$program; for link in qmail-remote qmail-rspawn; do \
	    [ "$$root$$home/bin/$$link" -ef "$$root$$file" ] && \
	        used=$$used$$link; done; \
	if [ "$$used" ] && [ -z '$(DESTDIR)' ]; then \
	    said=$$(try "$$new/qmail_remote.py" x '@<' x | \
	        tr -d '\000' | sed 's/^Z//'); \
	    case $$said in "DSorry, that sender address "*) ;; \
	    *) refuse "As qmailr a delivery would say: $$said" ;; esac; \
	    said=$$(cd "$$home/control" && try "$$python" -IBSc '$(TLS_FILES)' \
	        "$$new" tlshosts/*.pem notlshosts/*) || refuse "As qmailr a \
	delivery cannot use control/$$(echo "$$said" | sed -n '$$p')"; \
	fi; \
	case $$used in *qmail-rspawn*) [ '$(DESTDIR)' ] || { \
	    ln -s qmail_remote.py "$$new/qmail-rspawn"; \
	    [ $$(try "$$new/qmail-rspawn" | wc -c) -eq 1 ] || \
	        refuse 'As qmail-rspawn it does not start'; } ;; esac; \
	if [ "$$program" ] && [ -e "$$old" ] && \
	    ! grep "$$ours" "$$old" >/dev/null; then \
	    if [ -e "$$old.classic" ] || [ -L "$$old.classic" ]; then \
	        cmp -s "$$old" "$$old.classic" || refuse "$$old is not ours, and \
	$$old.classic is another program: move one away"; \
	    else \
	        rm -f "$$old.classic.new" && \
	        cp -p "$$old" "$$old.classic.new" && \
	        mv -f "$$old.classic.new" "$$old.classic" || \
	            refuse "Cannot save $$old"; \
	    fi; \
	fi; \
	mkdir -p "$$root$$lib/__pycache__" && \
	chmod 755 "$$root$$lib/__pycache__" && \
	"$$python" -X no_debug_ranges -ISc '$(COMPILE)' \
	    "$$new/qmail_remote.py" "$$root$$file" "$$file" && \
	chmod 644 "$$root$$lib"/__pycache__/qmail_remote.* || \
	    refuse "Cannot compile it"; \
	diff qmail_remote.py "$$new/qmail_remote.py" || :; \
	mv -f "$$new/qmail_remote.py" "$$root$$file" && \
	mv -f "$$new/page" "$$page" && rm -rf "$$new" || exit 1; \
	bin=$$root$$bin; \
	if [ "$$(cd "$$bin" && pwd -P)" != \
	    "$$(cd "$$root$$lib" && pwd -P)" ]; then \
	    rm -f "$$bin/qmail_remote.new" && \
	    ln -s "$$file" "$$bin/qmail_remote.new" && \
	    mv -f "$$bin/qmail_remote.new" "$$bin/qmail_remote.py" || exit 1; \
	fi; \
	if [ "$$program" ]; then \
	    rm -f "$$old.new" && ln -s "$$file" "$$old.new" && \
	    mv -f "$$old.new" "$$old" || exit 1; \
	    echo "$$old is now a link to $$file."; \
	fi; \
	[ "$$user" = qmailr ] || \
	    echo 'Let qmailr run it, before qmail does: README, section 2.'

install:
	@program=; $(INSTALL)

# In the place of qmail's own program, which is saved.
install-qmail:
	@program=qmail-remote; $(INSTALL)

install-qmail-rspawn:
	@program=qmail-rspawn; $(INSTALL); \
	echo 'qmail-send uses it when qmail is started again.'

# The old programs come back, whatever link leads to ours.  One that has no
# old program stays, or qmail would bounce all mail; then ours stays, too.
# $home: another home than the one that our file names, or empty.
RESTORE = ours=$$root$$lib/qmail_remote.py; left=; $(LEADS); \
	home=$${home:-/var/qmail}; \
	was=$$($(HOME_IN) "$$ours" 2>/dev/null) || :; was=$${was:-$$home}; \
	for link in "$$root$$was"/bin/* "$$root$$home"/bin/*; do \
	    leads "$$link" || continue; \
	    if [ -f "$$link.classic" ] && \
	        ! [ "$$link.classic" -ef "$$ours" ] && \
	        mv -f "$$link.classic" "$$link"; then \
	        echo "$$link is the old one again."; \
	    else \
	        echo "$$link is a link to $$ours, and there is no \
	$$link.classic: put another program there first." >&2; \
	        left=yes; \
	    fi; \
	done; \
	if [ "$$left" ]; then echo "$$ours stays." >&2; exit 1; fi

uninstall:
	@root='$(DESTDIR)'; lib='$(LIBDIR)'; bin='$(BINDIR)'; \
	home='$(QMAIL_HOME)'; $(RESTORE); \
	if [ ! -f "$$ours" ]; then \
	    echo "There is no $$ours: give the PREFIX and LIBDIR of the \
	installation.  Nothing is removed." >&2; exit 1; fi; \
	if [ "$$(readlink "$$root$$bin/qmail_remote.py")" = \
	    "$$lib/qmail_remote.py" ]; then \
	    rm -f "$$root$$bin/qmail_remote.py"; \
	fi && \
	rm -f '$(DESTDIR)$(MANDIR)/man8/qmail_remote.py.8' "$$ours" \
	    "$$root$$lib"/__pycache__/qmail_remote.* || exit 1; \
	rmdir "$$root$$lib/__pycache__" "$$root$$lib" 2>/dev/null || :

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
	    'file=/usr/lib/qmail-remote/qmail_remote.py' \
	    '$(DEBPYTHON) -X no_debug_ranges -ISc "$(COMPILE)" \' \
	    '    "$$DPKG_ROOT$$file" "$$DPKG_ROOT$$file" $$file' \
	    >$(DEB)/postinst && \
	printf '%s\n' '#!/bin/sh' 'set -e' \
	    'root=$$DPKG_ROOT lib=/usr/lib/qmail-remote bin=/usr/bin' \
	    'home=$(QMAIL_HOME)' 'if [ "$$1" = remove ]; then' \
	    '$(RESTORE)' 'fi' 'rm -rf "$$root$$lib/__pycache__"' \
	    >$(DEB)/prerm && \
	chmod 755 $(DEB)/postinst $(DEB)/prerm && \
	dpkg-deb --root-owner-group --build deb.new \
	    "qmail-remote-py_$${version}_all.deb"
	rm -rf deb.new

clean:
	rm -rf __pycache__ qmail-remote.8 qmail-remote.8.new deb.new
	rm -f qmail-remote-py_*_all.deb

.PHONY: help check lint coverage demo fuzz bench install install-qmail \
	install-qmail-rspawn uninstall deb clean
