#!/bin/sh
# qmail_remote.py: qmail-remote and qmail-rspawn for qmail, in one file.
''':'
trap 'exit 111' 0
set -e
# sh runs the lines down to the second ':', Python takes them for a string.
# qmail-rspawn reads exit status 111 as a deferral, and any other but 0 as a
# bounce.  So 111 is what sh must end with, whatever keeps Python from running:
# python3 is missing, no memory or process is left, this file is cut short.
# - The trap is for what ends sh itself, such as a syntax error.  posh runs it
#   only after set -e.
# - python3 is a child process, for each sh acts differently if exec fails.
# - Descriptor 2 is the pipe that qmail-rspawn reads reports from.  A traceback
#   there would bounce the mail, so it becomes /dev/null, if it is no terminal.
#   The braces do that, not exec, for the reason above.
fd=3
[ -t 2 ] && fd=2
{
LC_ALL=C python3 -ISB -X under_sh -c '
import posix, sys
from _frozen_importlib_external import SourceFileLoader, cache_from_source
del sys.argv[0]
path = sys.argv[0]
# Bytecode is beside the file, not beside a link to it.
try:
    for _ in range(40):
        link = posix.readlink(path)
        path = link if link[0] == "/" else path[:path.rfind("/") + 1] + link
except OSError:
    pass
loader = SourceFileLoader("qmail_remote", path)
# To compile the file takes longer than to deliver a message.  But whoever can
# write its bytecode, or the directory that holds it, can run what he likes as
# our user.  So bytecode is used only if root alone can.  lstat, not stat: the
# owner of a link could make it lead elsewhere after this check.  get_code()
# does not take bytecode of another source or for another Python.
try:
    cache = cache_from_source(path)
    for entry, kind in (cache[:cache.rfind("/")], 0o40000), (cache, 0o100000):
        status = posix.lstat(entry)
        if status.st_uid or status.st_mode & 0o170022 != kind:
            raise OSError
    code = loader.get_code("qmail_remote")
except Exception:
    code = loader.source_to_code(loader.get_data(path), path)
exec(code)
# main() does not return, so the last lines of the file are missing.
sys.exit(111)
' "$0" "$@" && trap - 0 && exit 0
} 3>/dev/null 2>&$fd 3>&-
exit 111
':'''
#
# Copyright (c) 2026 the qmail_remote.py authors
#
# Permission to use, copy, modify, and distribute this software for any
# purpose with or without fee is hereby granted, provided that the above
# copyright notice and this permission notice appear in all copies.
#
# THE SOFTWARE IS PROVIDED "AS IS" AND THE AUTHOR DISCLAIMS ALL WARRANTIES
# WITH REGARD TO THIS SOFTWARE INCLUDING ALL IMPLIED WARRANTIES OF
# MERCHANTABILITY AND FITNESS. IN NO EVENT SHALL THE AUTHOR BE LIABLE FOR
# ANY SPECIAL, DIRECT, INDIRECT, OR CONSEQUENTIAL DAMAGES OR ANY DAMAGES
# WHATSOEVER RESULTING FROM LOSS OF USE, DATA OR PROFITS, WHETHER IN AN
# ACTION OF CONTRACT, NEGLIGENCE OR OTHER TORTIOUS ACTION, ARISING OUT OF
# OR IN CONNECTION WITH THE USE OR PERFORMANCE OF THIS SOFTWARE.

# ---------------------------------------------------------------- 1. Start
# qmail-rspawn runs "qmail-remote host sender recip..." with a message on
# descriptor 0, and reads from descriptor 1 what has become of it:
#
#   $ qmail_remote.py example.com me@example.org friend@example.com <message
#   r\0K192.0.2.25 accepted message.\nRemote host said: 250 ok\n\0
#
# The way of a delivery: main() and run() read the arguments and the control
# files (6); deliver() (15) takes a route and a list of servers from the
# control files and DNS (7 to 9) and tries them in turn, each by a
# Connection (12), a Session and a Transaction (14), until one of them gives
# the Result (4) that is printed.  As qmail-rspawn the file stays in memory
# and makes many deliveries (16).
#
# Sections: 2 Safety rules, 3 Limits, 4 Results, 5 Addresses, 6 Control
# files, 7 DNS wire, 8 DNS lookups, 9 Routing, 10 TLS policy, 11 Replies,
# 12 Connection, 13 Message, 14 Session, 15 Delivery, 16 Spawner, 17 Main,
# 18 Manual.  No section uses a later one.

# The C halves of os, struct, stat and socket have all that we need, and this
# is the time to be mean: bare Python starts in 7 ms, os proper costs another
# 1 ms and socket proper 8, at every delivery.
import errno
import fcntl
import posix as os
import select
import sys
import time
import _socket as socket
import _stat as stat
import _struct as struct

VERSION = '1.1'
QMAIL_HOME = "/var/qmail"


class Record:
    """A record with the fields that __slots__ names, in their order.  One
    field too few or too many is a TypeError."""
    __slots__: tuple = ()

    def __init__(self, *fields):
        if len(fields) != len(self.__slots__):
            raise TypeError('%s has %d fields, not %d' % (
                type(self).__name__, len(self.__slots__), len(fields)))
        for name, field in zip(self.__slots__, fields):
            setattr(self, name, field)

    def _fields(self):
        return tuple(getattr(self, name) for name in self.__slots__)

    def __eq__(self, other):
        return type(self) is type(other) and self._fields() == other._fields()

    def __repr__(self):
        return '%s%r' % (type(self).__name__, self._fields())


# --------------------------------------------------------- 2. Safety rules
# What must never happen, and the functions that see to it.  A rule that
# would hang on one line is kept a second time, at the edge ("again").  The
# tests of class SafetyRules have the numbers of these rules; one of them
# takes each line away in turn, and sees the rule's own test fail.
#
#  1  A password goes only to a relay that authsenders or smtproutes names.
#     choose_route(); again: Session.guard_password().
#  2  A password travels over verified TLS on every port but 25 and 26 and
#     beyond this host, and never in clear text after TLS has failed.
#     choose_tls(), last_policy(); again: Session.guard_password().
#  3  Nothing in a message can look like its end, however it is cut into
#     blocks.  wire_form(); again: Transaction.guard_end_of_data().
#  4  No byte of an address, a control file or a message becomes a command.
#     envelope_address(), parse_helohost(), a_labels() and base64 by their
#     alphabets; again: Dialogue.send_pipelined().
#  5  Mail by DNS is never sent to this host, nor to an exchanger that is not
#     preferred to it.  better_than_own(); again: ServerTry.run().
#  6  If the end of the data may have arrived and its reply has not, the mail
#     is tried again, and the report says "Possible duplicate".
#     Dialogue.in_doubt, ServerTry.broken_off().
#  7  K is reported only after a 2xx reply to the end of this message.
#     Transaction.end_of_data_reply(); again: ServerTry.confirm().  What
#     fails later changes nothing: ServerTry.broken_off().
#  8  D and h are reported only for what a server, DNS or the message itself
#     said, and not if our configuration may be the reason.  permanent(),
#     Transaction.soften(), best_refusal().  All else is a Z: main().
#  9  Authentic TLSA records decide.  If they are there, TLS is required; if
#     they are not known for now, the server is skipped.  choose_tls(),
#     dane_check(); again: ServerTry.run().
# 10  A name becomes a part of a path only if it is a host name or an
#     address.  host_name(), literal(); again: read_tls_control().
# 11  Every wait has a deadline.  wait() is the only code that waits; one
#     deadline is for a whole reply, not for each byte of it.
# 12  Nothing that a peer sends makes this process grow without end: the
#     limits of section 3 hold while reading.  ReplyReader, Connection,
#     read_file(), parse_answer().
# 13  No secret is shown, in a report or on a terminal.  Redactor.


# ------------------------------------------------------------------- 3. Limits
# Each number with its unit and its source.  Times are in seconds, sizes in
# bytes.  A number without a source is our own choice; the reason follows it.

PORT_SMTP = 25                  # RFC 5321 4.5.4.2
PORT_SMTPS = 465                # RFC 8314 3.3: TLS from the first byte
PORTS_MX = (25, 26)             # a password may go there without checked TLS
DISCARD_PORT = 9                # RFC 863; no datagram is sent to it

TIMEOUT_CONNECT = 60            # default (qmail-remote.8, timeoutconnect)
TIMEOUT_REMOTE = 1200           # default (qmail-remote.8, timeoutremote)
TIMEOUT_MAX = 86400             # of both: a day
CONTROL_MAX = 1 << 20           # of a control file
BYTE_ORDER_MARK = b'\xef\xbb\xbf'   # RFC 3629 6: some editors begin so

REPLY_SIZE_MAX = 1 << 20        # of a reply that is read
REPLY_KEPT = 16384              # of a reply that is kept, before masking
REPLY_MAX = 5000                # of a reply in a report (qmail-remote.c,
                                # HUGESMTPTEXT)
SUMMARY_MAX = 200               # of a reply in the attempt log: one line
INPUT_BLOCK = 65536             # of one receive: the largest pipe or window
IDLE_MAX = 256                  # receives, where a peer may never stop
BACKLOG_MAX = 16 << 20          # of replies kept while we still send: those to
                                # a few thousand recipients

MESSAGE_BLOCK = 262144          # of one read of the message
SEND_PIECE = 65536              # of the message or of commands: each piece
                                # has timeoutremote to leave
PEEK_MAX = 32768                # of a pipe that is read ahead, for SIZE
COUNTED_MAX = 4 << 20           # of a file whose lines are counted, for SIZE

SERVERS_MAX = 20                # addresses that one delivery tries
EXCHANGERS_MAX = 128            # exchangers whose addresses are looked up
ADDRESSES_MAX = 80              # addresses of one exchanger and family

SECRET_PART = 4                 # of a secret: so many in a row show too much
AUTH_LINE_MAX = 12288           # of an answer, no CR LF (RFC 4954 section 4)
AUTH_COMMAND_MAX = 510          # of the command, no CR LF (RFC 5321
                                # 4.5.3.1.4, RFC 4954 section 4)

ORPHAN_CHECK = 5                # between two looks at the launcher
IP_BIND_ADDRESS_NO_PORT = 24    # linux/in.h; not in every Python
TRACE_TIMEOUT = 5               # until a terminal that takes nothing is left
PROGRESS_AFTER = 1              # until a message has a line of progress
PROGRESS_EVERY = 0.2            # until that line is written again

DNS_PORT = 53                   # RFC 1035 4.2
DNS_TIMEOUT, DNS_TIMEOUT_MAX = 5, 30        # resolv.conf(5), timeout
DNS_ATTEMPTS, DNS_ATTEMPTS_MAX = 2, 5       # rounds; resolv.conf(5), attempts
DNS_SERVERS_MAX = 3             # name servers (resolv.conf(5), MAXNS)
DNS_PATIENCE = 2                # until the best exchangers alone are enough
# Name servers on this host: their answers cross no network, on which another
# could set the AD bit.
DNS_TRUSTED = b'127.0.0.1', b'::1', b'127.0.0.53'
DNS_UDP_SIZE = 1232             # of a datagram that no network has to cut
                                # (dnsflagday.net/2020)
DNS_NAME_MAX = 255              # of a name in wire form (RFC 1035 2.3.4)
DNS_TLSA_MAX = 32               # TLSA records of one server; our choice
DNS_LINKS_MAX = 10              # CNAMEs followed for one question
DNS_TOGETHER = 3 * EXCHANGERS_MAX       # questions at once: A, AAAA, TLSA
DNS_BYTES_MAX = DNS_TOGETHER * 1365     # answers to one delivery: 512 KiB

TLS_KEPT = 64                   # entries of each table of a TlsCache
TLS_HANDSHAKE = 60              # or timeoutremote, if that is less

# queue/lock/tcpto (tcpto.c)
TCPTO_RECORDS, TCPTO_SIZE = 64, 16      # records; bytes of one
TCPTO_COUNT_MAX = 10            # timeouts that are counted
TCPTO_SKIP_COUNT = 2            # timeouts, from which on a server is skipped
TCPTO_FRESH = 120               # so long a timeout counts no other
TCPTO_WAIT, TCPTO_STEP = 1, 0.01        # for the lock; between two tries

SPAWN_LIMIT, SPAWN_LIMIT_MAX = 120, 255     # deliveries at once (conf-spawn);
                                # a delivery number is one byte (spawn.c)
SPAWN_FIELD_MAX = 1 << 20       # of a sender or recipient
SPAWN_MESSID_MAX = 99           # of a message's number (spawn.c)
SPAWN_BATCH = 50                # recipients of one delivery
SPAWN_GATHER = 0.005            # until a batch leaves that may still grow
SPAWN_BACKLOG = 1 << 20         # of reports that qmail-send has not read
SPAWN_PACE = 0.002              # between two forks: a worker may come free
SPAWN_RETRY = 1                 # after a fork that failed, with workers left
SPAWN_JOB_MAX = 1 << 32         # of a worker's job: any number
SPAWN_ANSWER_MAX = 16 << 20     # of a worker's answer
WORKER_GROUPS = 200             # deliveries until a worker is replaced
WORKER_IDLE = 60                # without a delivery until a worker ends

# Errors of this host, not of a peer: no server is to blame for them.
LOCAL_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


# ------------------------------------------------------------------ 4. Results
# What a delivery can end with, and the only code that writes to fd 1, and to
# fd 2 if that is a terminal.  The texts stand in the order of the manual's
# REPORTS.

# Permanent (D; h for one recipient).
USAGE = b'DI (qmail-remote) was invoked improperly. (#5.3.5)\n'
NO_HOST = b"DSorry, I couldn't find any host named %s. (#5.1.2)\n"
NO_ADDRESS = b"DSorry, I couldn't find a mail exchanger or IP address. " \
    b"(#5.4.4)\n"
NULL_MX = b'DSorry, %s does not accept mail. (#5.1.10)\n'
OWN_ADDRESS = b"DSorry. Although I'm listed as a best-preference MX or A " \
    b"for that host,\nit isn't in my control/locals file, so I don't treat " \
    b"it as local. (#5.4.6)\n"
PARTIAL_LINE = b'DSMTP cannot transfer messages with partial final lines. ' \
    b'(#5.6.2)\n'
BAD_SENDER = b'DSorry, that sender address cannot be sent over SMTP. ' \
    b'(#5.1.7)\n'
BAD_RECIPIENT = b'hSorry, that address cannot be sent over SMTP. (#5.1.3)\n'
NO_RECIPIENT = b'DGiving up: no address is left to send to. (#5.1.3)\n'
SENDER_8BIT = b'D%s does not take non-ASCII addresses, such as the ' \
    b"sender's. (#5.6.7)\n"
RECIPIENTS_8BIT = b'D%s does not take non-ASCII addresses. (#5.6.7)\n'

# Temporary (s): the message goes to other recipients.
RECIPIENT_8BIT = b's%s does not take non-ASCII addresses. (#4.6.7)\n'

# Permanent as they stand; soften() makes them temporary.  %s is the server's
# address, here and below, if nothing else is said.
SENDER_REJECTED = b'DConnected to %s but sender was rejected.\n'
RECIPIENT_REJECTED = b'h%s does not like recipient.\n'
GIVING_UP = b'DGiving up on %s.\n'
DATA_FAILED = b'D%s failed on DATA command.\n'
MESSAGE_FAILED = b'D%s failed after I sent the message.\n'

# Temporary (Z), because of this host, its control files or its network.
NO_HOME = b'ZUnable to switch to home directory. (#4.3.0)\n'
NO_CONTROL = b'ZUnable to read control files. (#4.3.0)\n'
NOT_OURS = b"ZI cannot send from %s, which is in control/outgoingip: " \
    b"%s. (#4.3.0)\n"
NO_MEMORY = b'ZOut of memory. (#4.3.0)\n'
NO_RESOURCES = b'ZSystem resources temporarily unavailable. (#4.3.0)\n'
KILLED = b'ZI was told to stop. (#4.3.0)\n'
NO_MESSAGE = b'ZUnable to read message. (#4.3.0)\n'
DNS_TEMPORARY = b"ZSorry, I couldn't find any host by that name. (#4.1.2)\n"
NO_RELAY = b"ZSorry, I couldn't find the relay %s. (#4.4.4)\n"
TLSA_TEMPORARY = b"ZSorry, I couldn't look up the TLSA records of %s. " \
    b"(#4.4.3)\n"

# Temporary (Z), because of the servers.
NO_CONNECTION = b"ZSorry, I wasn't able to establish an SMTP connection. " \
    b"(#4.4.1)\n"
GREETING_FAILED = b'ZConnected to %s but greeting failed.\n'
NAME_REJECTED = b'ZConnected to %s but my name was rejected.\n'
DIED = b'ZConnected to %s but connection died. (#4.4.2)\n'
DIED_LATE = b'ZConnected to %s but connection died. ' \
    b'Possible duplicate! (#4.4.2)\n'
AUTH_REJECTED = b'ZConnected to %s but authentication was rejected (%s).\n'
AUTH_UNDECODABLE = b'ZConnected to %s but unable to base64decode challenge.\n'
AUTH_UNENCODABLE = b'ZConnected to %s but unable to base64encode %s.\n'
TLS_FAILED = b'ZConnected to %s but TLS failed: %s. (#4.7.5)\n'
TLS_FORBIDDEN = b'ZNo password is sent without TLS, but ' \
    b'control/notlshosts/%s\nforbids TLS on port %d. (#4.7.5)\n'

# Lines that may follow TLS_FAILED.
TLS_CLEAR = b'No password is sent in the clear after TLS has failed.\n'
TLS_PASSWORD = b'No password is sent to this port without TLS and a ' \
    b'certificate that can be\nverified.\n'
TLS_TRUST = b"To trust this relay, put its certificate, or its CA's, into\n" \
    b'control/tlshosts/%s.pem.\n'
TLS_FILE = b'Only the certificates in control/tlshosts/%s.pem\n' \
    b'are trusted for this server.\n'

# Success, after K.
ACCEPTED = b'%s accepted message.\n'

# Lines about a password that was not used; with K before ACCEPTED.
AUTH_MISSING = b'no supported AUTH method found, continuing without ' \
    b'authentication.\n'
AUTH_LACKING = b'the line of this route in the control files has no %s, ' \
    b'continuing without authentication.\n'

# The last line where TLS failed, in the place of a TLS summary.
TLS_GAVE_UP = b'TLS failed: %s\n'
TLS_IN_THE_CLEAR = b'TLS failed: %s, sent in the clear\n'

# From qmail-rspawn itself (spawn.c, qmail-rspawn.c).
SPAWN_TOO_LONG = b'Zqmail-spawn out of memory. (#4.3.0)\n'
SPAWN_NO_OPEN = b'Zqmail-spawn unable to open message. (#4.3.0)\n'
SPAWN_NO_FSTAT = b'Zqmail-spawn unable to fstat message. (#4.3.0)\n'
SPAWN_NO_PIPE = b'Zqmail-spawn unable to create pipe. (#4.3.0)\n'
SPAWN_NO_FORK = b'Zqmail-spawn unable to fork. (#4.3.0)\n'
SPAWN_CRASHED = b'Zqmail-remote crashed.\n'
SPAWN_SILENT = b'Zqmail-remote produced no output.\n'
SPAWN_WRONG_TYPE = b'ZSorry, message has wrong type. (#4.3.5)\n'
SPAWN_WRONG_OWNER = b'ZSorry, message has wrong owner. (#4.3.5)\n'
SPAWN_NO_HOST = b'DSorry, address must include host name. (#5.1.3)\n'
SPAWN_TOO_BIG = b'ZInternal error: delnum too big. (#4.3.5)\n'
SPAWN_IN_USE = b'ZInternal error: delnum in use. (#4.3.5)\n'
SPAWN_NONNUMERIC = b'DInternal error: messid has nonnumerics. (#5.3.5)\n'
SPAWN_MESSID_LONG = b'DInternal error: messid too long. (#5.3.5)\n'
SPAWN_MESSID_SHORT = b'DInternal error: messid too short. (#5.3.5)\n'


class Result:
    """How a delivery, or the try of one server, has ended (texts: bytes)."""
    __slots__ = ('report', 'recipients', 'try_next', 'reached', 'answered',
                 'diagnostic', 'tls_summary', 'rcpt_sent', 'tls_failed')
    report: bytes               # the message report: K, Z or D, and its text;
                                # empty if there was only no connection
    recipients: list            # their reports, in the order of the arguments
    try_next: bool              # nothing is decided: the next server may do
                                # better
    reached: bool               # there was a connection
    answered: bool              # a refusal by the server
    diagnostic: bytes           # what went wrong in short, for the attempt log
    tls_summary: bytes          # the last line of the message report, or empty
    rcpt_sent: bool             # a server may know the recipients
    tls_failed: object          # the TlsFailed that ended the connection, or
                                # None

    def __init__(self, report, recipients=(), try_next=False, reached=True,
                 answered=False, diagnostic=b'', tls_summary=b''):
        self.report, self.recipients = report, list(recipients)
        self.try_next, self.reached = try_next, reached
        self.answered, self.rcpt_sent = answered, False
        self.diagnostic, self.tls_summary = diagnostic, tls_summary
        self.tls_failed = None


class LocalFault(Exception):
    """A fault of this host, or of the message that it was given.  It ends
    the delivery: no server is to blame.  report: the message report
    (bytes)."""

    def __init__(self, report):
        Exception.__init__(self, report)
        self.report = report


class ConnectionLost(Exception):
    """The connection cannot be used any more.  diagnostic: why, in a few
    words (bytes)."""

    def __init__(self, diagnostic):
        Exception.__init__(self, diagnostic)
        self.diagnostic = diagnostic


class ProtocolError(ConnectionLost):
    """The peer is out of step.  Its connection counts as lost."""


class TlsFailed(Exception):
    """TLS could not be used on a connection.

    reason      why (bytes)
    anchors     certificates (DER) of issuers that a TLSA record names: a
                second handshake must verify the server's with them
    certificate     the server's certificate was not good enough
    silent      the handshake timed out, or the connection was lost before the
                server had sent anything in it
    resumed     a TLS session was to be resumed: without, it may succeed"""

    def __init__(self, reason, anchors=(), certificate=False, silent=False):
        Exception.__init__(self, reason)
        self.reason, self.anchors, self.resumed = reason, anchors, False
        self.certificate, self.silent = certificate, silent


class TimedOut(Exception):
    """A deadline has passed."""


def temporary(report):
    """The report as a temporary one: D becomes Z, h becomes s."""
    return {b'D': b'Z', b'h': b's'}.get(report[:1], report[:1]) + report[1:]


def printable(text):
    """text with ? for each byte outside 33-126 (qmail-remote.c,
    outsafe())."""
    return bytes(c if 33 <= c <= 126 else 63 for c in text)


def output_of(result):
    """All that goes to fd 1: each report, and a NUL at its end.  A NUL in a
    report would begin another one, and becomes ?."""
    return b''.join(report.replace(b'\0', b'?') + b'\0'
                    for report in result.recipients +
                    [result.report + result.tls_summary])


def brief(result):
    """A Result with the first lines of the reports only, for when there is
    no memory for the others.  The letters stay."""
    short = Result(result.report.split(b'\n')[0] + b'\n',
                   [report.split(b'\n')[0] + b'\n' * (report != b'r')
                    for report in result.recipients])
    short.rcpt_sent = result.rcpt_sent
    return short


def write_output(output):
    """Writes to fd 1.  An error ends it silently: there is no other place to
    report to."""
    try:
        os.set_blocking(1, True)
        while output:
            output = write_some(output)
    except OSError:
        pass


def write_some(output):
    """Writes to fd 1 once.  Returns what is left.  Raises OSError."""
    return output[os.write(1, output):]


class Trace:
    """Shows on a terminal what the program does, as it happens.

    fd          the descriptor of the terminal; None: nothing is shown
    wait        as wait(), which section 12 defines
    clock       seconds, as time.monotonic()
    colours     {mark: what switches its colour on}; empty: no colours
    plain       what switches a colour off

    A terminal that is stopped or gone ends the trace, not the delivery.
    Secrets must be hidden before: Dialogue.show() does it."""
    SENT, RECEIVED, NOTE = b'>>> ', b'<<< ', b'--- '

    def __init__(self, fd=None, wait=None, clock=time.monotonic):
        self.fd, self.wait, self.clock = fd, wait, clock
        self.colours, self.plain = {}, b''
        self.next_progress = 0      # when to write the line of progress
        self.progress_shown = False     # it stands where the cursor is

    def use_colours(self):
        """Switches colours on if the terminal has eight (terminfo(5)) and
        NO_COLOR is not set (no-color.org)."""
        if self.fd is None or os.environ.get(b'NO_COLOR'):
            return
        try:
            import curses
            curses.setupterm(None, self.fd)
            if curses.tigetnum('colors') < 8:
                return
            colour = curses.tigetstr('setaf') or b''
            self.plain = curses.tigetstr('sgr0') or b''
            self.colours = {mark: curses.tparm(colour, number) for
                            mark, number in ((self.SENT, 6),
                                             (self.RECEIVED, 2),
                                             (b'<<< 4', 1), (b'<<< 5', 1))}
        except (ImportError, TypeError, ValueError, curses.error):
            self.colours, self.plain = {}, b''

    def write(self, mark, text):
        """Writes each line of text (bytes) after the mark.  Bytes that a
        terminal could obey are shown as visible() does."""
        if self.fd is None:
            return
        lines = [mark + visible(line)
                 for line in text.rstrip(b'\n').split(b'\n')]
        shown = b'\n' if self.progress_shown else b''
        for line in lines:
            colour = self.colours.get(line[:5], self.colours.get(mark, b''))
            shown += colour + line + (self.plain if colour else b'') + b'\n'
        self.progress_shown = False
        self._write_terminal(shown)

    def start_progress(self):
        """The first bytes of a message are about to be sent."""
        self.next_progress = self.clock() + PROGRESS_AFTER

    def progress(self, sent, size):
        """Shows that sent of size bytes are out, counted on the wire; size
        is None if it is not known.  One line that is written again and
        again, first after PROGRESS_AFTER, then every PROGRESS_EVERY."""
        if self.fd is None or self.clock() < self.next_progress:
            return
        text = self.NOTE + b'message: %.1f MB' % (sent / 1e6)
        if size:
            text += b' of %.1f MB, %d %%' % (
                size / 1e6, min(100 * sent // size, 100))
        self.next_progress = self.clock() + PROGRESS_EVERY
        self.progress_shown = True
        self._write_terminal(b'\r' + text.ljust(60))

    def _write_terminal(self, data):
        """Writes all of data, or ends the trace."""
        try:
            while data:
                self.wait((), (self.fd,), self.clock() + TRACE_TIMEOUT)
                data = data[os.write(self.fd, data):]
        except (OSError, TimedOut):
            self.fd = None


NO_TRACE = Trace()


def visible(text):
    """Bytes outside 32-126 as \\x and two hexadecimal digits."""
    return b''.join(b'%c' % c if 32 <= c <= 126 else b'\\x%02x' % c
                    for c in text)


# ---------------------------------------------------------------- 5. Addresses
# Envelope addresses, host names and IP addresses.  Pure.
#
# A host text is a name as people write it: b'mx.example'.  A wire name is the
# same name as DNS sends it (RFC 1035 3.1), in lower case: b'\2mx\7example\0'.
# to_wire() and host_text() are the only ways from one to the other.

SPECIALS = b'"(),:;<>@[\\]'     # RFC 5321 4.1.2: not in a Dot-string


def unsafe(text):
    """Whether text holds a byte that ends a command or an argument: a
    control byte, a space, < or >."""
    return any(c <= 32 or c == 127 or c in b'<>' for c in text)


def quote(box):
    """A local part as Dot-string or Quoted-string (RFC 5321 4.1.2)."""
    if box and not box.startswith(b'.') and not box.endswith(b'.') \
            and b'..' not in box \
            and not any(c <= 32 or c == 127 or c in SPECIALS for c in box):
        return box
    return b'"' + box.replace(b'\\', b'\\\\').replace(b'"', b'\\"') + b'"'


def envelope_address(address):
    """The address as it is sent between < and > (RFC 5321 4.1.2).  None if it
    must never be sent: CR, LF or NUL anywhere, or an unsafe() domain.  The
    domain is not changed (qmail-remote.c, addrmangle())."""
    if b'\r' in address or b'\n' in address or b'\0' in address:
        return None
    box, at, domain = address.rpartition(b'@')
    if unsafe(domain):
        return None
    return quote(box) + at + domain if at else domain


def non_ascii(text):
    """Whether text holds a byte over 127, which needs SMTPUTF8 (RFC 6531)."""
    return any(c > 127 for c in text)


def a_labels(host):
    """A host text in ASCII: labels in UTF-8 are normalized (NFC), made lower
    case and encoded in Punycode (RFC 5891).  None if it is not UTF-8.  No
    IDNA 2003 mapping: it would send mail for one domain to another."""
    if not non_ascii(host):
        return host
    import unicodedata
    try:
        text = unicodedata.normalize('NFC', host.decode('utf-8'))
        text = unicodedata.normalize('NFC', text.lower())
        return b'.'.join(
            label.encode('ascii') if max(label, default='') < '\x80'
            else b'xn--' + label.encode('punycode')
            for label in text.split('.'))
    except UnicodeError:
        return None


def domain_key(domain):
    """The key of a host text, or of its end from a dot on, in smtproutes: in
    A-labels and lower case, without the final dot."""
    labels = a_labels(domain) if len(domain) <= 4 * DNS_NAME_MAX else None
    key = (domain if labels is None else labels).lower()
    return key[:-1] if key.endswith(b'.') and key != b'.' else key


def to_wire(host):
    """The wire name of a host text; None if it cannot have one."""
    if len(host) > 4 * DNS_NAME_MAX:    # too long, even after Punycode
        return None
    host = a_labels(host)
    if host is None:
        return None
    labels = (host[:-1] if host.endswith(b'.') else host).split(b'.')
    if not all(0 < len(label) < 64 and not unsafe(label) and
               b'[' not in label for label in labels):
        return None
    name = b''.join(bytes((len(label),)) + label for label in labels) + b'\0'
    return name.lower() if len(name) <= DNS_NAME_MAX else None


def labels_of(wire_name):
    """The labels of a wire name, without the empty one at its end."""
    labels, at = [], 0
    while wire_name[at:at + 1] > b'\0':
        end = at + 1 + wire_name[at]
        labels.append(wire_name[at + 1:end])
        at = end
    return labels


def host_text(wire_name):
    """The host text of a wire name.  None unless each label is made of the
    characters of a host name: only then it is safe in a path, and can stand
    in a certificate."""
    labels = labels_of(wire_name)
    if not labels or not all(
            c in b'abcdefghijklmnopqrstuvwxyz0123456789-_'
            for label in labels for c in label):
        return None
    return b'.'.join(labels)


def dotted(wire_name):
    """A wire name to be shown to a person, whatever bytes it holds."""
    return b'.'.join(labels_of(wire_name)) or b'.'


def canonical(text):
    """An IP address in its canonical short form, IPv4 in IPv6 as IPv4; None
    if text is no IP address.  Strict: four decimal numbers, no zone."""
    try:
        return address_text(packed(text))
    except (OSError, ValueError):
        return None


def address_text(data):
    """The IP address (text) of 4 or 16 bytes.  ::ffff:1.2.3.4 is 1.2.3.4."""
    if len(data) == 16 and data.startswith(bytes(10) + b'\xff\xff'):
        data = data[12:]
    family = socket.AF_INET if len(data) == 4 else socket.AF_INET6
    return socket.inet_ntop(family, data).encode('ascii')


def family_of(address):
    """AF_INET or AF_INET6, for an address as canonical() gives it."""
    return socket.AF_INET6 if b':' in address else socket.AF_INET


def packed(address):
    """The 4 or 16 bytes of an IP address (text).  Raises OSError or
    ValueError if it is none."""
    return socket.inet_pton(family_of(address), address.decode('ascii'))


def literal(host):
    """The IP address in 1.2.3.4, [1.2.3.4], [2001:db8::1] or
    [IPv6:2001:db8::1] (RFC 5321 4.1.3); None if host is none of these."""
    if not host.startswith(b'['):
        return canonical(host) if b':' not in host else None
    if not host.endswith(b']'):
        return None
    inner = host[1:-1]
    if inner[:5].lower() == b'ipv6:':
        inner = inner[5:]
        return canonical(inner) if b':' in inner else None
    return canonical(inner)


# ------------------------------------------------------------ 6. Control files
# The only code that opens control files, and pure parsers for what they hold.
# They are read as control.c of qmail reads them; qmail-control(5).

class Control(Record):
    """What the control files say, as read_control() returns it."""
    __slots__ = ('helohost', 'timeoutconnect', 'timeoutremote', 'smtproutes',
                 'authsenders', 'moreipme', 'notipme', 'outgoingip', 'batch')
    helohost: bytes
    timeoutconnect: int         # seconds
    timeoutremote: int          # seconds
    smtproutes: dict            # see parse_routes()
    authsenders: dict           # see parse_senders()
    moreipme: list              # see parse_networks()
    notipme: list
    outgoingip: dict            # see parse_outgoing()
    batch: int


class Route(Record):
    """How mail is routed, by one line of smtproutes or authsenders.

    relay        the relay's host text or IP address; None: mail exchangers
    port         None: 25
    credentials  (user, password), or None
    lacking      what a line with | has not: b'user' or b'password'; or b''
    login_only   the line, of authsenders, names no relay and no port of its
                 own: smtproutes and DNS choose them, the line the login"""
    __slots__ = ('relay', 'port', 'credentials', 'lacking', 'login_only')
    relay: 'bytes | None'
    port: 'int | None'
    credentials: 'tuple | None'
    lacking: bytes
    login_only: bool

    def __init__(self, relay, port, credentials, lacking=b'',
                 login_only=False):
        Record.__init__(self, relay, port, credentials, lacking, login_only)


class Invalid(Exception):
    """A control file, or a line of it, breaks the rules for it."""


def absent(path):
    """Whether there is no such entry, not even a symbolic link.  Raises
    OSError if a link without a target is in its place or on the way to it:
    a file was meant to be there, for example the certificate of a server
    that gets a password."""
    ends = [at for at, c in enumerate(path) if c == ord('/') and at]
    for end in ends + [len(path)]:
        try:
            os.lstat(path[:end])
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
                return True
            raise
        os.stat(path[:end])
    return False


def read_file(path, most):
    """The bytes of a regular file or a character device; None if it is
    absent().  Never waits for a FIFO.  Raises OSError, and Invalid if it is
    anything else or holds more than most bytes."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENAMETOOLONG) and absent(path):
            return None
        raise
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISCHR(mode)):
            raise Invalid(path)
        data = b''
        while len(data) <= most:
            block = os.read(fd, most + 1 - len(data))
            if not block:
                return data
            data += block
        raise Invalid(path)
    finally:
        os.close(fd)


def read_control_file(name):
    """The bytes of control/name; None if it is absent().  Raises OSError, and
    Invalid: for a byte order mark, too, which would be a part of the first
    key or value."""
    data = read_file(b'control/' + name, CONTROL_MAX)
    if data is not None and data.startswith(BYTE_ORDER_MARK):
        raise Invalid(name)
    return data


def read_control():
    """All control files, from below the current directory, as a Control.
    Raises LocalFault."""
    read = read_control_file
    try:
        me, helohost = read(b'me'), read(b'helohost')
        return Control(
            parse_helohost(me if helohost is None else helohost),
            parse_number(read(b'timeoutconnect'), TIMEOUT_CONNECT),
            parse_number(read(b'timeoutremote'), TIMEOUT_REMOTE),
            parse_routes(read(b'smtproutes')),
            parse_senders(read(b'authsenders')),
            parse_networks(read(b'moreipme')),
            parse_networks(read(b'notipme')),
            parse_outgoing(read(b'outgoingip')),
            min(parse_number(read(b'batch'), SPAWN_BATCH), SPAWN_BATCH))
    except (OSError, Invalid):
        raise LocalFault(NO_CONTROL)


def read_concurrency():
    """The number of deliveries that a spawner runs at once.  Raises
    LocalFault."""
    try:
        data = read_control_file(b'concurrencyspawn')
    except (OSError, Invalid):
        raise LocalFault(NO_CONTROL)
    return min(parse_number(data, SPAWN_LIMIT), SPAWN_LIMIT_MAX)


# The files that a delivery depends on.  read_tls_control() reads two more,
# for each server anew.
SIGNED_FILES = [b'control/' + name for name in (
    b'me', b'helohost', b'timeoutconnect', b'timeoutremote', b'smtproutes',
    b'authsenders', b'moreipme', b'notipme', b'outgoingip', b'batch',
    b'concurrencyspawn', b'clientcert.pem', b'tlsclientciphers')] + \
    [b'/etc/resolv.conf']


def control_signature(more=()):
    """A list that changes when one of SIGNED_FILES, or of the paths in more,
    changes, or a symbolic link in its place."""
    signature: list = []
    for path in SIGNED_FILES + list(more):
        for status_of in os.lstat, os.stat:
            try:
                status = status_of(path)
                signature.append((
                    status.st_dev, status.st_ino, status.st_size,
                    status.st_mtime_ns, status.st_ctime_ns))
            except OSError as error:
                signature.append(error.errno)
    return signature


class TlsControl(Record):
    """What the control files say about TLS with one server.

    pem      the PEM certificates to trust (tlshosts); None: no file
    never    no TLS at all (notlshosts)
    cert     the path of our own certificate; None: no file
    ciphers  a list for OpenSSL; empty: no file"""
    __slots__ = ('pem', 'never', 'cert', 'ciphers')
    pem: 'bytes | None'
    never: bool
    cert: 'bytes | None'
    ciphers: bytes


def read_tls_defaults():
    """The TlsControl for a host that neither tlshosts nor notlshosts names.
    Raises LocalFault."""
    try:
        cert = read_control_file(b'clientcert.pem')
        ciphers = read_control_file(b'tlsclientciphers')
    except (OSError, Invalid):
        raise LocalFault(NO_CONTROL)
    return TlsControl(
        None, False, None if cert is None else b'control/clientcert.pem',
        first_line(ciphers or b''))


def read_tls_control(name):
    """The TlsControl for a host name or an address.  Raises LocalFault."""
    if b'/' in name or name[:1] == b'.':
        raise LocalFault(NO_CONTROL)            # rule 10 again
    control = read_tls_defaults()
    try:
        control.pem = read_control_file(b'tlshosts/' + name + b'.pem')
        control.never = read_control_file(b'notlshosts/' + name) is not None
    except (OSError, Invalid):
        raise LocalFault(NO_CONTROL)
    return control


def first_line(data):
    """The first line, without the blanks at its end (control.c)."""
    return data.split(b'\n', 1)[0].rstrip(b' \t\n')


def lines_of(data):
    """The lines that are neither blank nor comments, without the blanks at
    their ends (control.c).  data may be None."""
    lines = (line.rstrip(b' \t') for line in (data or b'').split(b'\n'))
    return [line for line in lines if line and not line.startswith(b'#')]


def map_lines(data):
    """The lines_of() a file with keys.  Raises Invalid if one begins with a
    blank, because its key would match nothing; but blanks and a # begin a
    comment."""
    lines = [line for line in lines_of(data)
             if not line.lstrip(b' \t').startswith(b'#')]
    for line in lines:
        if line.startswith((b' ', b'\t')):
            raise Invalid(line)
    return lines


def split_key(line):
    """(key, colon, value), as line.partition(b':'), but a colon within [ ]
    is a part of the key, as in [IPv6:::1].  Raises Invalid if the key ends
    with a blank, because it would match nothing."""
    key, colon, value = line.partition(b':')
    inside, closed, rest = value.partition(b']')
    if closed and b'[' not in inside and key.rfind(b'[') > key.rfind(b']'):
        more, colon, value = rest.partition(b':')
        key += b':' + inside + b']' + more
    if key.endswith((b' ', b'\t')):
        raise Invalid(line)
    return key, colon, value


def parse_helohost(data):
    """The name for EHLO.  Raises Invalid if it is empty or unsafe()."""
    name = first_line(data or b'')
    if not name or unsafe(name):
        raise Invalid('helohost')
    return name


def parse_number(data, default):
    """The ASCII digits that data begins with, as a number from 1 to
    TIMEOUT_MAX; default if it begins with none, or is None (control.c,
    control_readint())."""
    line = first_line(data or b'')
    digits = line[:len(line) - len(line.lstrip(b'0123456789'))]
    if not digits:
        return default
    # Six digits exceed TIMEOUT_MAX.  Python refuses int() of 5,000 digits.
    return min(max(int(digits.lstrip(b'0')[:6] or b'0'), 1), TIMEOUT_MAX)


def parse_port(digits):
    """A port, from 1 to 65535.  Raises Invalid."""
    if not digits.isdigit() or len(digits) > 5 or \
            not 0 < int(digits) < 65536:
        raise Invalid(digits)
    return int(digits)


def parse_networks(data):
    """Addresses, one a line, alone or with /bits or /mask, as a list of
    (packed address, packed mask).  Raises Invalid."""
    found = []
    for line in lines_of(data):
        text, slash, mask = line.partition(b'/')
        address = canonical(text.strip(b'[]'))
        if address is None:
            raise Invalid(line)
        size = len(packed(address))
        bits = mask if slash else b'%d' % (8 * size)
        if bits.isdigit() and len(bits) < 4 and int(bits) <= 8 * size:
            number = (1 << 8 * size) - (1 << 8 * size - int(bits))
            found.append((packed(address), number.to_bytes(size, 'big')))
        elif size == 4 and b':' not in mask and canonical(mask):
            found.append((packed(address), packed(mask)))
        else:
            raise Invalid(line)
    return found


def parse_outgoing(data):
    """outgoingip as {address family: IP address}: at most one of each.
    Raises LocalFault with a report that names the wrong line."""
    found = {}
    for line in lines_of(data):
        address = canonical(line.strip(b'[]'))
        if address is None:
            raise LocalFault(NOT_OURS % (printable(line), b'no IP address'))
        if family_of(address) in found:
            raise LocalFault(NOT_OURS % (
                address, b'one of each kind is enough'))
        found[family_of(address)] = address
    return found


def in_networks(address, networks):
    """Whether an IP address is in networks, a list of parse_networks()."""
    wanted = packed(address)
    return any(len(network) == len(wanted) and all(
        ours & m == theirs & m
        for ours, theirs, m in zip(wanted, network, mask))
        for network, mask in networks)


def parse_routes(data):
    """smtproutes as {domain_key(): Route}.  Raises Invalid."""
    routes = {}
    for line in map_lines(data):
        domain, colon, value = split_key(line)
        if colon:
            routes[domain_key(domain)] = parse_route(value)
    return routes


def parse_senders(data):
    """authsenders as {sender in lower case: Route}.  Raises Invalid.  A line
    has a colon, a | or both: sender:relay, sender|user|password,
    sender:relay|user|password."""
    senders = {}
    for line in map_lines(data):
        place, bar, _ = line.partition(b'|')
        sender, colon, _ = split_key(place)
        if colon or bar:
            route = parse_route(line[len(sender) + len(colon):])
            route.login_only = bool(bar) and not (route.relay or route.port)
            senders[sender.lower()] = route
    return senders


def parse_route(value):
    """relay[:port][|user|password] as a Route.  Raises Invalid."""
    if b'\r' in value or b'\0' in value:
        raise Invalid(value)
    place, bar, login = value.partition(b'|')
    relay, port = parse_place(place)
    user, _, password = login.partition(b'|')
    if user and password:
        return Route(relay, port, (user, password))
    if not bar:
        return Route(relay, port, None)
    return Route(relay, port, None, b'user' if password else b'password')


def parse_place(place):
    """relay[:port] as (relay or None, port or None).  ; is as good as :, and
    an IPv6 address needs its brackets.  Raises Invalid."""
    if place.startswith(b'['):
        end = place.find(b']') + 1
    else:
        end = len(place.replace(b';', b':').split(b':', 1)[0])
    relay, rest = place[:end], place[end:]
    if literal(relay) is None and (
            place.startswith(b'[') or (relay and to_wire(relay) is None)):
        raise Invalid(place)
    if not rest:
        return relay or None, None
    if not rest.startswith((b':', b';')):
        raise Invalid(place)
    return relay or None, parse_port(rest[1:])


# ----------------------------------------------------------------- 7. DNS wire
# Questions built, answers parsed (RFC 1035).  Pure.  All names here are wire
# names in lower case, so that equal names are equal bytes.

A, CNAME, SOA, MX, AAAA, OPT, TLSA = 1, 5, 6, 15, 28, 41, 52
NOERROR, FORMERR, NXDOMAIN, NOTIMP, BADVERS = 0, 1, 3, 4, 16
QR, OPCODE, AA, TC = 0x8000, 0x7800, 0x0400, 0x0200
RD, RA, AD = 0x0100, 0x0080, 0x0020
HEADER_SIZE = 12                # RFC 1035 4.1.1


class Malformed(Exception):
    """An answer that breaks RFC 1035."""


class TooMuch(Malformed):
    """More bytes of answers than one delivery may read."""


class Answer(Record):
    """A parsed answer.

    rcode      with the upper bits that EDNS adds (RFC 6891 6.1.3)
    truncated  ask again over TCP; the records were not read
    lame       the server has no authority (AA), and offers no recursion (RA)
    records    (owner, type, value) of the answer section: only records of
               the type asked for, and CNAMEs
    has_soa    the authority section has an SOA: there is no more to be found
    authentic  the server has validated the answer (AD, RFC 4035 3.2.3)"""
    __slots__ = ('rcode', 'truncated', 'lame', 'records', 'has_soa',
                 'authentic')
    rcode: int
    truncated: bool
    lame: bool
    records: list
    has_soa: bool
    authentic: bool


def build_question(ident, wire_name, qtype, edns, want_ad=False):
    """The packet of a recursive question (RFC 1035 4.1), with EDNS0 (RFC 6891
    6.1.2) or without.  want_ad: the answer may have AD (RFC 6840 5.7)."""
    flags = RD | AD if want_ad else RD
    return struct.pack('>6H', ident, flags, 1, 0, 0, 1 if edns else 0) \
        + wire_name + struct.pack('>2H', qtype, 1) \
        + (struct.pack('>BHHLH', 0, OPT, DNS_UDP_SIZE, 0, 0) if edns else b'')


class Names:
    """The names in a packet, each read once, and so is the end of a name that
    pointers lead to.  All of them together take no more steps, labels and
    pointers, than the packet has bytes; honest packets need far fewer."""

    def __init__(self, packet):
        self.packet, self.steps = packet, len(packet)
        self.known = {}         # where it begins: (wire name, where it ends)

    def read(self, at):
        """(wire name, where it ends).  Pointers must lead strictly backwards,
        so that there is no loop (RFC 1035 4.1.4).  Raises Malformed."""
        begin, name, parts = at, b'', []
        while at is not None and at not in self.known:
            start, before = at, len(name)
            labels, end, at = self._labels(start)
            if at is not None and not HEADER_SIZE <= at < start:
                raise Malformed('pointer not backwards')
            name += labels
            parts.append((start, before, end))
        if at is not None:
            name += self.known[at][0]
        if len(name) > DNS_NAME_MAX:
            raise Malformed('long name')
        name = name.lower()
        for start, before, end in parts:
            self.known[start] = name[before:], end
        return self.known[begin]

    def _labels(self, start):
        """(the labels up to a pointer or the root, where these end, where the
        pointer leads or None).  Raises Malformed."""
        packet, at = self.packet, start
        while at < len(packet) and self.steps:
            self.steps -= 1
            size = packet[at]
            if size >= 0xC0 and at + 2 <= len(packet):
                return packet[start:at], at + 2, \
                    struct.unpack_from('>H', packet, at)[0] & 0x3FFF
            at += 1 + size
            if size > 63 or at > len(packet) or at - start > DNS_NAME_MAX:
                raise Malformed('label')
            if not size:
                return packet[start:at], at, None
        raise Malformed('name past the end')


def read_record(names, at):
    """(owner, type, start of rdata, end of rdata, TTL) of the record there
    (RFC 1035 3.2.1).  The type is None for a class other than IN.  Raises
    Malformed."""
    packet = names.packet
    owner, at = names.read(at)
    if at + 10 > len(packet):
        raise Malformed('record past the end')
    rtype, rclass, ttl, size = struct.unpack_from('>HHLH', packet, at)
    at += 10
    if at + size > len(packet):
        raise Malformed('rdata past the end')
    if rtype != OPT and rclass != 1:
        rtype = None
    return owner, rtype, at, at + size, ttl


def read_value(names, rtype, start, end):
    """The value of a record.

    A, AAAA      an IP address (text)
    MX           (preference, wire name)
    CNAME        a wire name
    TLSA         (usage, selector, matching type, data) (RFC 6698 2.1)
    other types  None

    A TLSA record that is too short gets numbers that dane_usable() refuses:
    other records remain usable, and the name still has TLSA records.  Raises
    Malformed."""
    packet = names.packet
    if rtype in (A, AAAA):
        if end - start != (4 if rtype == A else 16):
            raise Malformed('address length')
        return address_text(packet[start:end])
    if rtype == TLSA:
        data = packet[start:end].ljust(3, b'\xff')
        return tuple(data[:3]) + (data[3:],)
    if rtype == MX:
        if end - start < 3:
            raise Malformed('MX length')
        name, after = names.read(start + 2)
        value = struct.unpack_from('>H', packet, start)[0], name
    elif rtype == CNAME:
        name, after = names.read(start)
        value = name
    else:
        return None
    if after != end:
        raise Malformed('name and rdata length differ')
    return value


def parse_answer(packet, ident, wire_name, qtype):
    """The Answer to this question; None if the packet is not one.  A FORMERR
    or NOTIMP without a question is an answer: servers that do not know EDNS
    send the header alone.  Raises Malformed if it is an answer, but breaks
    the rules."""
    if len(packet) < HEADER_SIZE:
        return None
    got, flags, questions = struct.unpack_from('>3H', packet)
    rcode = flags & 15
    if got != ident or flags & (QR | OPCODE) != QR:
        return None
    if rcode in (FORMERR, NOTIMP) and (
            not questions or len(packet) == HEADER_SIZE):
        return Answer(rcode, False, False, [], False, False)
    names = Names(packet)
    if questions != 1 or not has_question(names, wire_name, qtype):
        return None
    if flags & TC:
        return Answer(rcode, True, False, [], False, False)
    answer = Answer(rcode, False, not flags & (AA | RA), [], False,
                    bool(flags & AD))
    read_sections(names, HEADER_SIZE + len(wire_name) + 4, qtype, answer)
    return answer


def has_question(names, wire_name, qtype):
    """Whether the first question of a packet is this one, not compressed."""
    try:
        asked, at = names.read(HEADER_SIZE)
    except Malformed:
        return False
    return asked == wire_name and \
        names.packet[at:at + 4] == struct.pack('>2H', qtype, 1)


def read_sections(names, at, qtype, answer):
    """Reads the records from at on into an Answer (RFC 1035 4.1).  Raises
    Malformed."""
    answers, authority, additional = struct.unpack_from('>3H', names.packet,
                                                        6)
    for index in range(answers + authority + additional):
        owner, rtype, start, at, ttl = read_record(names, at)
        if index < answers:
            value = read_value(names, rtype, start, at)
            if rtype in (qtype, CNAME):
                answer.records.append((owner, rtype, value))
        elif rtype == SOA and index < answers + authority:
            answer.has_soa = True
        elif rtype == OPT:
            answer.rcode |= ttl >> 24 << 4      # RFC 6891 6.1.3


def settles(answer, wire_name, qtype):
    """Whether an Answer decides its question.  A lame one decides only with
    records of the type asked for; it proves nothing about their absence.
    Raises Malformed."""
    if answer.lame:
        return answer.rcode == NOERROR and \
            bool(follow(answer.records, wire_name, qtype)[0])
    return answer.rcode in (NOERROR, NXDOMAIN)


def follow(records, wire_name, qtype, most=DNS_LINKS_MAX):
    """(the values of type qtype, where the CNAMEs from the name lead, the
    number of them).  Only records of these names count, in any order.
    Raises Malformed if there are more than most CNAMEs on the way."""
    aliases = {owner: value for owner, rtype, value in records
               if rtype == CNAME}
    owners = [wire_name]
    while qtype != CNAME and owners[-1] in aliases:
        if len(owners) > most:
            raise Malformed('CNAME chain')
        owners.append(aliases[owners[-1]])
    chain = set(owners)
    values = [value for owner, rtype, value in records
              if rtype == qtype and owner in chain]
    return values, owners[-1], len(owners) - 1


# -------------------------------------------------------------- 8. DNS lookups
# The only code that asks name servers.  Each question is a generator.  It
# yields what it waits for, (socket, whether to write, deadline), and
# run_concurrently() runs any number of them together.

class NameServer(Record):
    """family and sockaddr: the address as the socket module wants it."""
    __slots__ = ('family', 'sockaddr')
    family: int
    sockaddr: tuple


class DnsConfig(Record):
    """Which name servers are asked, and how (resolv.conf(5)).

    servers   NameServers, 1 to DNS_SERVERS_MAX
    trusted   AD in their answers is believed: all of them are on this host,
              where resolvers that validate are, or resolv.conf says trust-ad.
              A mere forwarder, such as Docker's 127.0.0.11, would pass on an
              AD that an attacker between it and its server has set
    timeout   seconds for one server
    attempts  rounds over all servers
    tcp       never UDP (use-vc)"""
    __slots__ = ('servers', 'trusted', 'timeout', 'attempts', 'tcp')
    servers: list
    trusted: bool
    timeout: int
    attempts: int
    tcp: bool


class Lookup(Record):
    """What became of a question.

    status     OK: the name exists; values may be empty.
               NO_NAME: there is no such name.
               TEMPORARY: no server gave a usable answer.
               LATE: the answer is still out, and was not waited for
    values     see read_value()
    authentic  validated by a server that is trusted, at every step
    wire_name  where the CNAMEs from the name lead"""
    __slots__ = ('status', 'values', 'authentic', 'wire_name')
    status: str
    values: list
    authentic: bool
    wire_name: bytes
    OK, NO_NAME, TEMPORARY, LATE = 'ok', 'no name', 'temporary', 'late'

    def unknown(self):
        """Whether a later question may be answered otherwise."""
        return self.status in (Lookup.TEMPORARY, Lookup.LATE)

    def is_secure(self):
        """Whether there are values, and they are authentic."""
        return self.authentic and bool(self.values)


def split_port(text):
    """(address, port) of 1.2.3.4, 1.2.3.4:53, ::1, [::1] or [::1]:53; the
    address is not checked.  Raises Invalid."""
    if text.startswith(b'['):
        address, bracket, rest = text[1:].partition(b']')
        if not bracket or rest[:1] not in (b'', b':'):
            raise Invalid(text)
        return address, parse_port(rest[1:]) if rest else DNS_PORT
    if text.count(b':') == 1:
        address, _, digits = text.partition(b':')
        return address, parse_port(digits)
    return text, DNS_PORT


def scope_id(zone):
    """The scope of an IPv6 address: a number, or the name of an interface
    (RFC 4007 11).  Raises OSError, ValueError."""
    if zone.isdigit() and len(zone) < 10:
        return int(zone)
    return socket.if_nametoindex(zone.decode('ascii', 'replace'))


def name_server(text):
    """The NameServer of an address, with or without a port, see split_port(),
    or a zone: fe80::1%eth0.  None if text is none of these."""
    try:
        place, port = split_port(text)
        place, percent, zone = place.partition(b'%')
        scope = scope_id(zone) if percent else 0
    except (Invalid, OSError, ValueError):
        return None
    address = canonical(place)
    if address is None:
        return None
    if family_of(address) == socket.AF_INET6:
        return NameServer(socket.AF_INET6, (address, port, 0, scope))
    return NameServer(socket.AF_INET, (address, port))


def name_servers(texts):
    """The NameServers of the first DNS_SERVERS_MAX texts that name one."""
    servers = [name_server(text) for text in texts]
    return [server for server in servers
            if server is not None][:DNS_SERVERS_MAX]


def parse_resolv_conf(data, override=b''):
    """The DnsConfig of resolv.conf(5), and of $DNSCACHEIP (override) if that
    names a server.  What is not understood is skipped.  data may be None."""
    listed, options = [], {}
    for line in (data or b'').split(b'\n'):
        words = line.split()
        if words[:1] == [b'nameserver']:
            listed += words[1:2]
        elif words[:1] == [b'options']:
            options.update(word.partition(b':')[::2] for word in words[1:])
    servers = name_servers(override.split())
    trust_ad = not servers and b'trust-ad' in options
    servers = servers or name_servers(listed) or name_servers([b'127.0.0.1'])
    return DnsConfig(
        servers,
        # All or none: what a trusted server calls bogus is asked of the next.
        trust_ad or all(server.sockaddr[0] in DNS_TRUSTED
                        for server in servers),
        min(parse_number(options.get(b'timeout'), DNS_TIMEOUT),
            DNS_TIMEOUT_MAX),
        min(parse_number(options.get(b'attempts'), DNS_ATTEMPTS),
            DNS_ATTEMPTS_MAX),
        b'use-vc' in options)


def value_text(qtype, value):
    """A value of read_value() to be shown to a person."""
    if qtype == MX:
        return b'%d %s' % (value[0], dotted(value[1]))
    if qtype == TLSA:
        return b'%d %d %d ' % value[:3] + value[3].hex().encode('ascii')
    return dotted(value) if qtype == CNAME else value


def lookup_summary(wire_name, qtype, lookup):
    """A question and what became of it, for the trace."""
    kind = {A: b'A', AAAA: b'AAAA', MX: b'MX', TLSA: b'TLSA',
            CNAME: b'CNAME'}[qtype]
    if lookup.status == Lookup.OK:
        text = b', '.join(value_text(qtype, value)
                          for value in lookup.values) or b'none'
    else:
        text = {Lookup.NO_NAME: b'no such name',
                Lookup.TEMPORARY: b'temporary failure',
                Lookup.LATE: b'no answer yet'}[lookup.status]
    if lookup.wire_name != wire_name:
        text += b', of ' + dotted(lookup.wire_name)
    return b'DNS: %s %s: %s%s' % (dotted(wire_name), kind, text,
                                  b' (AD)' if lookup.authentic else b'')


def run_concurrently(jobs, wait, clock, enough=None):
    """Runs generators together; returns their results in order.  Each yields
    (socket or None, whether to write, deadline), and is resumed when the
    socket is ready, or with TimedOut.  After DNS_PATIENCE seconds the run
    ends as soon as enough(results) is true; None stands for the result of a
    job that is not done."""
    return ConcurrentJobs(jobs, wait, clock).run(enough)


class ConcurrentJobs:
    """The state of run_concurrently()."""

    def __init__(self, jobs, wait, clock):
        self.jobs, self.wait, self.clock = jobs, wait, clock
        self.results = [None] * len(jobs)
        self.started = 0
        self.waiting = {}       # index of a job: what it has yielded

    def run(self, enough):
        """The results; what is not done then is closed."""
        patience = self.clock() + DNS_PATIENCE if enough else float('inf')
        self.start()
        while self.waiting:
            if self.clock() < patience:
                self.wait_once(patience)
            elif enough(self.results):
                break
            else:
                self.wait_once(float('inf'))
            self.start()
        for index in self.waiting:
            self.jobs[index].close()
        return self.results

    def start(self):
        """Starts jobs, as many as may run at once."""
        while self.started < len(self.jobs) and \
                len(self.waiting) < DNS_TOGETHER:
            self.started += 1
            self.resume(self.started - 1)

    def resume(self, index, error=None):
        """Runs a job until it waits, or ends."""
        job = self.jobs[index]
        try:
            self.waiting[index] = job.throw(error) if error else next(job)
        except StopIteration as stop:
            self.waiting.pop(index, None)
            self.results[index] = stop.value

    def wait_once(self, until):
        """Waits for the next event, or until then, and resumes the jobs that
        it concerns."""
        sockets = [], []        # to read, to write
        for sock, to_write, deadline in self.waiting.values():
            until = min(until, deadline)
            if sock is not None:
                sockets[to_write].append(sock)
        try:
            reading, writing = self.wait(sockets[0], sockets[1], until)
        except TimedOut:
            reading, writing = [], []
        ready, now = set(reading + writing), self.clock()
        for index, (sock, _, deadline) in list(self.waiting.items()):
            if deadline <= now:
                self.resume(index, TimedOut())
            elif sock in ready:
                self.resume(index)


class Resolver:
    """Asks the name servers of config, a DnsConfig.  Begins with the one that
    answered last; at first that is the NameServer first, if it is one of
    them.  wait and clock: see section 12."""

    def __init__(self, config, wait, clock, trace=NO_TRACE, first=None):
        self.config, self.wait, self.clock = config, wait, clock
        self.trace = trace
        self.first = config.servers.index(first) \
            if first in config.servers else 0
        self.open = 0           # sockets in use
        self.left = DNS_BYTES_MAX       # bytes of answers that may come

    def preferred(self):
        """The NameServer that is asked first."""
        return self.config.servers[self.first]

    def trusted(self):
        """Whether AD in the answers is believed."""
        return self.config.trusted

    def ask(self, questions, enough=None):
        """The Lookups of questions, pairs of a wire name and a type, asked
        together.  Takes at most the time of one question (attempts * servers
        * timeout), for up to DNS_TOGETHER questions.  enough: see
        run_concurrently(); what is not answered by then is LATE."""
        lookups = run_concurrently(
            [self._resolve(*question) for question in questions],
            self.wait, self.clock, enough)
        for index, (wire_name, qtype) in enumerate(questions):
            if lookups[index] is None:
                lookups[index] = Lookup(Lookup.LATE, [], False, wire_name)
                self._show(wire_name, qtype, lookups[index])
        return lookups

    def _resolve(self, wire_name, qtype):
        """A job: the Lookup of a question, which the trace shows at once."""
        try:
            lookup = yield from self._follow_aliases(wire_name, qtype)
        except Malformed:       # a chain of CNAMEs that is too long
            lookup = Lookup(Lookup.TEMPORARY, [], False, wire_name)
        self._show(wire_name, qtype, lookup)
        return lookup

    def _show(self, wire_name, qtype, lookup):
        if self.trace.fd is not None:
            self.trace.write(Trace.NOTE,
                             lookup_summary(wire_name, qtype, lookup))

    def _follow_aliases(self, wire_name, qtype):
        """The Lookup of a question.  An answer that ends with a CNAME, and
        has no SOA, leads to a question for its target.  Raises Malformed
        after DNS_LINKS_MAX CNAMEs."""
        config, name, links = self.config, wire_name, 0
        authentic = config.trusted
        end = self.clock() + \
            config.attempts * len(config.servers) * config.timeout
        while True:
            answer = yield from self._any_server(name, qtype, end)
            if answer is None:
                return Lookup(Lookup.TEMPORARY, [], False, wire_name)
            authentic = authentic and answer.authentic
            values, name, more = follow(answer.records, name, qtype,
                                        DNS_LINKS_MAX - links)
            links += more
            if not values and answer.rcode == NXDOMAIN:
                return Lookup(Lookup.NO_NAME, [], authentic, name)
            if values or answer.has_soa or not more:
                return Lookup(Lookup.OK, values, authentic, name)

    def _any_server(self, name, qtype, end):
        """The first Answer that settles() the question; None if there is none
        before end.  Rounds after the first do without EDNS: a middlebox that
        does not know EDNS may have dropped the question."""
        count = len(self.config.servers)
        for attempt in range(self.config.attempts):
            first = self.first
            for turn in range(count):
                index = (first + turn) % count
                try:
                    answer = yield from self._server(
                        self.config.servers[index], name, qtype, attempt == 0,
                        min(end, self.clock() + self.config.timeout))
                    if settles(answer, name, qtype):
                        self.first = index
                        return answer
                except TooMuch:
                    return None
                except (Malformed, TimedOut):
                    pass
                except OSError as error:
                    if error.errno in LOCAL_ERRORS:
                        raise
        return None

    def _server(self, server, name, qtype, edns, deadline):
        """One server's Answer, at once without EDNS if the server does not
        know it.  Raises Malformed, TimedOut, OSError."""
        answer = yield from self._exchange(server, name, qtype, edns,
                                           deadline)
        if edns and answer.rcode in (FORMERR, NOTIMP, BADVERS):
            answer = yield from self._exchange(server, name, qtype, False,
                                               deadline)
        return answer

    def _exchange(self, server, name, qtype, edns, deadline):
        """One server's Answer to one packet: over UDP, and over TCP if it was
        truncated (RFC 7766).  Raises Malformed, TimedOut, OSError."""
        ident = struct.unpack('>H', os.urandom(2))[0]
        packet = build_question(ident, name, qtype, edns, self.config.trusted)

        def understand(reply):
            return parse_answer(reply, ident, name, qtype)
        if not self.config.tcp:
            answer = yield from self._udp(server, packet, understand,
                                          deadline)
            if not answer.truncated:
                return answer
        answer = yield from self._tcp(server, packet, understand, deadline)
        return answer

    def _socket(self, server, kind, deadline):
        """A socket that does not block.  Waits for a descriptor as long as
        other questions hold some.  Raises OSError, TimedOut."""
        while True:
            try:
                sock = socket.socket(server.family, kind)
                break
            except OSError as error:
                if error.errno not in LOCAL_ERRORS or not self.open:
                    raise
            if self.clock() >= deadline:
                raise TimedOut()
            try:
                yield None, False, min(deadline, self.clock() + 0.02)
            except TimedOut:
                pass
        self.open += 1
        sock.setblocking(False)
        return sock

    def _close(self, sock):
        self.open -= 1
        sock.close()

    def _take(self, size):
        """Counts an answer of size bytes.  Raises TooMuch: reading what a
        hostile zone sends, 384 answers of 64 KiB, would take seconds."""
        if size > self.left:
            raise TooMuch('bytes')
        self.left -= size

    def _udp(self, server, packet, understand, deadline):
        """One server's Answer over UDP; other datagrams are ignored."""
        sock = yield from self._socket(server, socket.SOCK_DGRAM, deadline)
        try:
            bind_random_port(sock, server.family)
            sock.connect(server.sockaddr)
            sock.send(packet)
            while True:
                yield sock, False, deadline
                try:
                    data = sock.recv(65536)
                except BlockingIOError:
                    continue
                if data[:2] == packet[:2]:
                    self._take(len(data))
                answer = understand(data)
                if answer is not None:
                    return answer
        finally:
            self._close(sock)

    def _tcp(self, server, packet, understand, deadline):
        """One server's Answer over TCP (RFC 1035 4.2.2, RFC 7766)."""
        sock = yield from self._socket(server, socket.SOCK_STREAM, deadline)
        try:
            try:
                sock.connect(server.sockaddr)
            except BlockingIOError:
                yield sock, True, deadline
            raise_error_of(sock)
            sock.send(struct.pack('>H', len(packet)) + packet)
            data, size = bytearray(), 2
            while len(data) < size:
                yield sock, False, deadline
                try:
                    block = sock.recv(size - len(data))
                except BlockingIOError:
                    continue
                if not block:
                    raise Malformed('closed half-way')
                data += block
                if len(data) == size == 2:
                    size += struct.unpack('>H', data)[0]
                    self._take(size)
            answer = understand(bytes(data[2:]))
            if answer is None or answer.truncated:
                raise Malformed('no answer over TCP')
            return answer
        finally:
            self._close(sock)


def bind_random_port(sock, family):
    """Binds to a source port that cannot be guessed (RFC 5452); if none of
    eight random ones is free, the kernel will choose."""
    host = b'0.0.0.0' if family == socket.AF_INET else b'::'
    for number in struct.unpack('>8H', os.urandom(16)):
        try:
            return sock.bind((host, 1024 + number % 64512))
        except OSError:
            continue


def raise_error_of(sock):
    """Raises the OSError of a connect() that did not wait, if it failed."""
    error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))


# ------------------------------------------------------------------ 9. Routing
# The route, the servers in their order, own addresses, tcpto.
#
# choose_route() reads the control files' routes.  find_servers() turns the
# route into a ServerList: exchangers by MX or a relay, their addresses and
# TLSA records by ExchangerSearch, without those that are no better than this
# host.  Each step that finds nothing says why in a report.

class Tlsa(Record):
    """What is known of a server's TLSA records (RFC 7672 2.2).

    status   RECORDS: it has some.  NONE: it has none, or they do not count.
             UNKNOWN: they may count, but their lookup failed temporarily
    records  (usage, selector, matching type, data), see read_value()
    host     the host text of the name that has them: an alias's target, or
             the server's name; None if it is no host name, or with NONE"""
    __slots__ = ('status', 'records', 'host')
    status: str
    records: list
    host: 'bytes | None'
    RECORDS, NONE, UNKNOWN = 'records', 'none', 'unknown'


NO_TLSA = Tlsa(Tlsa.NONE, [], None)
UNKNOWN_TLSA = Tlsa(Tlsa.UNKNOWN, [], None)


class Server(Record):
    """An address to try.

    address   the IP address
    port      the port
    name      the host text of the exchanger or relay; the address if it has
              none
    tlsa      a Tlsa
    next_hop  the host text of the domain or relay that the mail is for, and
              of the name where its CNAMEs lead; None for what is none"""
    __slots__ = ('address', 'port', 'name', 'tlsa', 'next_hop')
    address: bytes
    port: int
    name: bytes
    tlsa: Tlsa
    next_hop: list

    def reference_names(self):
        """The names that a certificate may be for, where TLSA records of
        usage 2 decide (RFC 7672 3.2.2)."""
        return [name for name in [self.tlsa.host] + self.next_hop
                if name is not None]


class ServerList(Record):
    """What find_servers() has found.

    servers     Servers, in the order to try them
    report      why there are none (a message report); empty if there are
    incomplete  answers are still out that may add Servers at the end"""
    __slots__ = ('servers', 'report', 'incomplete')
    servers: list
    report: bytes
    incomplete: bool


class Exchanger(Record):
    """preference; wire_name, empty for an IP address; addresses, in the order
    to try them; tlsa, a Tlsa."""
    __slots__ = ('preference', 'wire_name', 'addresses', 'tlsa')
    preference: int
    wire_name: bytes
    addresses: list
    tlsa: Tlsa


class Targets(Record):
    """The names whose addresses are to be looked up.

    pairs      (preference, wire name), best first
    from_mx    MX records name them; otherwise the only one is the host
               itself, or the relay
    authentic  the answer was, so that TLSA records may count
    left_out   the preferences of those that are too many
    next_hop   see Server
    report     why there are none (a message report); empty if there are"""
    __slots__ = ('pairs', 'from_mx', 'authentic', 'left_out', 'next_hop',
                 'report')
    pairs: list
    from_mx: bool
    authentic: bool
    left_out: list
    next_hop: list
    report: bytes


class Located(Record):
    """Exchangers with addresses.

    exchangers  Exchangers, in any order
    report      why there are none (a message report); empty if there are
    unsure      the preferences of those that may have addresses, or more of
                them, when DNS is asked again
    late        answers are still out
    next_hop    see Server"""
    __slots__ = ('exchangers', 'report', 'unsure', 'late', 'next_hop')
    exchangers: list
    report: bytes
    unsure: list
    late: bool
    next_hop: list


def choose_route(host, sender, control):
    """The Route for this host and envelope sender (as given, unquoted).
    A Route without a relay never has credentials, nor the lack of them: they
    go only to a relay that the administrator named."""
    own = lookup_sender(sender, control.authsenders)
    if own is not None and not own.login_only:
        route = own
    else:
        route = lookup_host(host, control.smtproutes) or \
            Route(None, None, None)
        if own is not None:
            route = Route(route.relay, route.port, own.credentials,
                          own.lacking)
    if route.relay is None:
        route = Route(None, route.port, None)
    return route


def route_summary(host, sender, route, control):
    """The route and where it comes from, for the trace."""
    own = lookup_sender(sender, control.authsenders)
    by, words = b'DNS', b'the mail exchangers of ' + host
    if own is not None and not own.login_only:
        by = b'control/authsenders'
    elif lookup_host(host, control.smtproutes):
        by = b'control/smtproutes'
    if route.relay:
        words = b'relay ' + route.relay
    if route.port:
        words += b', port %d' % route.port
    if route.credentials:
        words += b', with a password'
    elif route.lacking:
        words += b', without a password, for the line has no ' + route.lacking
    elif own is not None and own.credentials:
        words += b', without a password, for no relay is named'
    return b'route: %s (%s)' % (words, by)


def lookup_host(host, routes):
    """The Route of the first of these that has one: host, its ends that start
    at a dot, longest first, the empty name; None if none has
    (qmail-remote.8, smtproutes)."""
    return lookup_suffix(domain_key(host), b'.', routes)


def lookup_sender(sender, routes):
    """The Route of the first of these that has one: sender, its ends that
    start at an @ or a dot, longest first, the empty sender; None if none
    has."""
    return lookup_suffix(sender.lower(), b'@.', routes)


def lookup_suffix(key, marks, table):
    """The value of the first of these that table has: key, its ends that
    start at one of marks, longest first, the empty key; None otherwise."""
    if key in table:
        return table[key]
    longest = max(map(len, table), default=0)   # a key may have 1 MiB
    for at in range(max(1, len(key) - longest), len(key)):
        if key[at] in marks and key[at:] in table:
            return table[key[at:]]
    return table.get(b'')


def find_servers(host, route, resolver, is_own, hurry=False):
    """The ServerList of a host and its Route (RFC 5321 5.1).  is_own tells
    whether an IP address is this host's.  With hurry the best exchangers are
    enough, see ExchangerSearch."""
    address = literal(route.relay or host)
    if address is not None:
        located = Located([Exchanger(0, b'', [address], NO_TLSA)], b'', [],
                          False, [])
    else:
        located = locate(host, route, resolver, hurry)
    if route.relay is None:
        located = better_than_own(located, is_own)
    return ServerList(
        servers_of(in_order(located.exchangers), route.port or PORT_SMTP,
                   located.next_hop),
        located.report, located.late)


def late_ones(servers, find):
    """Yields the Servers; when all of them have been tried in vain, also
    those that the ServerList of find() has besides."""
    yield from servers
    try:
        more = find().servers
    except OSError:             # the refusals so far count
        return
    known = [server.address for server in servers]
    yield from [server for server in more if server.address not in
                known][:SERVERS_MAX - len(servers)]


def servers_of(exchangers, port, next_hop):
    """The Servers of Exchangers, SERVERS_MAX at most, each address once."""
    servers, seen = [], set()
    for exchanger in exchangers:
        name = host_text(exchanger.wire_name)
        for address in exchanger.addresses:
            if len(servers) == SERVERS_MAX:
                return servers
            if address not in seen:
                seen.add(address)
                servers.append(Server(address, port, name or address,
                                      exchanger.tlsa, next_hop))
    return servers


def locate(host, route, resolver, hurry):
    """The Located of a relay that is a name, or of a host's exchangers."""
    targets = find_targets(host, route, resolver)
    if targets.report:
        return Located([], targets.report, [], False, [])
    search = ExchangerSearch(targets.pairs, (route.port or PORT_SMTP)
                             if targets.authentic else None)
    search.ask(resolver, hurry)
    exchangers = search.before_late()
    unsure = search.unsure() + targets.left_out
    if exchangers:
        report = b''
    elif unsure:
        report = DNS_TEMPORARY
    elif route.relay is None and (
            targets.from_mx or search.any_name_exists()):
        report = NO_ADDRESS
    else:
        report = no_such_name(host, route)
    return Located(exchangers, report, unsure, bool(search.late()),
                   targets.next_hop)


def no_such_name(host, route):
    """The report for a name that does not exist.  A relay that does not is a
    fault of the control files, and bounces nothing."""
    if route.relay is not None:
        return NO_RELAY % printable(route.relay)
    return NO_HOST % printable(host)


def find_targets(host, route, resolver):
    """The Targets of a host and its Route: the relay, or by MX."""
    wire_name = to_wire(route.relay or host)
    if wire_name is None:
        return Targets([], False, False, [], [], no_such_name(host, route))
    if route.relay is None:
        return find_exchangers(wire_name, host, resolver)
    return Targets([(0, wire_name)], False, resolver.trusted(), [],
                   [host_text(wire_name)], b'')


def find_exchangers(wire_name, host, resolver):
    """The Targets of a host: its MX records, or without any the host itself.
    A temporary failure never falls back to the host (RFC 5321 5.1)."""
    lookup, = resolver.ask([(wire_name, MX)])
    exchangers = [pair for pair in lookup.values if pair[1] != b'\0']
    report = b''
    if lookup.unknown():
        report = DNS_TEMPORARY
    elif lookup.status == Lookup.NO_NAME:
        report = NO_HOST % printable(host)
    elif lookup.values and not exchangers:
        report = NULL_MX % printable(host)      # RFC 7505
    if report:
        return Targets([], False, False, [], [], report)
    best = {}
    for preference, name in sorted(exchangers or [(0, wire_name)]):
        best.setdefault(name, preference)       # no duplicates
    ordered = [(preference, name) for name, preference in best.items()]
    return Targets(
        ordered[:EXCHANGERS_MAX], bool(exchangers), lookup.authentic,
        [preference for preference, _ in ordered[EXCHANGERS_MAX:]],
        [host_text(wire_name), host_text(lookup.wire_name)], b'')


class ExchangerSearch:
    """Looks up the addresses and TLSA records of targets, which are pairs of
    a preference and a wire name.  tlsa_port: the port that TLSA records are
    asked for; None: do not ask.

    With hurry the best exchangers are enough after DNS_PATIENCE seconds,
    see best_known().  before_late() then leaves out those that may have to
    come after one whose answer is out: that one may be this host, and only
    what is better than this host may be tried."""

    def __init__(self, targets, tlsa_port):
        self.tlsa_port = tlsa_port
        self.literals, self.names = [], []
        for preference, wire_name in targets:
            address = literal_target(wire_name)
            if address is None:
                self.names.append((preference, wire_name))
            else:
                self.literals.append(Exchanger(preference, b'', [address],
                                               NO_TLSA))
        self.lookups = {}       # question: Lookup, or None while it is out

    def ask(self, resolver, hurry):
        """Asks all questions.  Those about aliases are a second round, for
        they depend on the answers of the first."""
        questions = [question for _, wire_name in self.names
                     for question in self.questions(wire_name)]

        def enough(lookups):
            self.lookups = dict(zip(questions, lookups))
            return self.best_known()
        lookups = resolver.ask(questions, enough if hurry else None)
        self.lookups = dict(zip(questions, lookups))
        if self.tlsa_port is not None:
            questions = self.alias_questions()
            self.lookups.update(zip(questions, resolver.ask(questions)))

    def questions(self, wire_name):
        """The questions of the first round about a target."""
        return [(wire_name, A), (wire_name, AAAA)] + \
            self.tlsa_questions(wire_name)

    def tlsa_questions(self, wire_name):
        """The question for the TLSA records of a name (RFC 6698 3), as a
        list; empty if there is none to be asked."""
        if self.tlsa_port is None:
            return []
        label = b'_%d' % self.tlsa_port
        name = bytes((len(label),)) + label + b'\4_tcp' + wire_name
        return [(name, TLSA)] if len(name) <= DNS_NAME_MAX else []

    def alias_questions(self):
        """The questions of the second round, about targets that are aliases:
        for the TLSA records of what they stand for, if that is authentic;
        else whether the CNAME itself is, for then the TLSA records of the
        alias count (RFC 7672 2.2.2)."""
        questions = set()
        for (wire_name, qtype), lookup in self.lookups.items():
            if qtype != TLSA and lookup.values and \
                    lookup.wire_name != wire_name:
                questions.update(self.tlsa_questions(lookup.wire_name)
                                 if lookup.authentic
                                 else [(wire_name, CNAME)])
        return list(questions)

    def address_lookups(self, wire_name):
        """The Lookups of a target's addresses that are in."""
        pair = self.lookups[wire_name, A], self.lookups[wire_name, AAAA]
        return [lookup for lookup in pair if lookup is not None]

    def addresses(self, wire_name):
        """The addresses of a target, IPv4 first."""
        return [address for lookup in self.address_lookups(wire_name)
                for address in shuffled(lookup.values)[:ADDRESSES_MAX]]

    def best_known(self):
        """Whether there are targets with an address, and all that are as good
        or better are settled."""
        best = min(
            [exchanger.preference for exchanger in self.literals] +
            [preference for preference, wire_name in self.names
             if any(lookup.values
                    for lookup in self.address_lookups(wire_name))],
            default=None)
        return best is not None and all(
            self.is_settled(wire_name)
            for preference, wire_name in self.names if preference <= best)

    def is_settled(self, wire_name):
        """Whether a target has an address, or will have none.  TLSA records
        that may count have to be in as well."""
        lookups = self.address_lookups(wire_name)
        found = [lookup for lookup in lookups if lookup.values]
        if not found:
            return len(lookups) == 2
        if all(not lookup.authentic and lookup.wire_name == wire_name
               for lookup in found):
            return True
        return all(self.lookups[question] is not None
                   for question in self.tlsa_questions(wire_name))

    def unsure(self):
        """The preferences of targets that may have more addresses."""
        return [preference for preference, wire_name in self.names
                if any(lookup.unknown()
                       for lookup in self.address_lookups(wire_name))]

    def late(self):
        """The preferences of targets whose answers are not all in."""
        return [preference for preference, wire_name in self.names
                if any(self.lookups[question].status == Lookup.LATE
                       for question in self.questions(wire_name))]

    def any_name_exists(self):
        """Whether one of the targets exists in DNS."""
        return any(lookup.status == Lookup.OK
                   for _, wire_name in self.names
                   for lookup in self.address_lookups(wire_name))

    def found(self):
        """The Exchangers that have addresses."""
        found = list(self.literals)
        for preference, wire_name in self.names:
            addresses = self.addresses(wire_name)
            if addresses:
                found.append(Exchanger(preference, wire_name, addresses,
                                       self.tlsa(wire_name)))
        return found

    def before_late(self):
        """found(), up to the first late one that is worse than the best."""
        found = self.found()
        best = min((exchanger.preference for exchanger in found), default=0)
        limit = min([preference for preference in self.late()
                     if preference > best], default=None)
        return [exchanger for exchanger in found
                if limit is None or exchanger.preference < limit]

    def tlsa(self, wire_name):
        """The Tlsa of a target: of the name that an alias stands for, else of
        the alias itself (RFC 7672 2.2.2)."""
        lookups = self.address_lookups(wire_name)
        targets = [lookup.wire_name for lookup in lookups
                   if lookup.values and lookup.wire_name != wire_name]
        for owner in targets + [wire_name]:
            for question in self.tlsa_questions(owner):
                tlsa = dane_records(lookups, self.lookups.get(question),
                                    self.lookups.get((owner, CNAME)))
                if tlsa.status != Tlsa.NONE:
                    return Tlsa(tlsa.status, tlsa.records, host_text(owner))
        return NO_TLSA


def dane_records(addresses, tlsa, alias=None):
    """The Tlsa, without host, that follows from the Lookups of addresses, of
    TLSA and, for an alias of insecure addresses, of its CNAME; None: not
    asked.  Without authentic addresses, or an authentic alias, the Lookup of
    TLSA does not matter: unsigned zones are on servers that fail on TLSA
    (RFC 7672 2.2.2)."""
    counts = all(lookup.authentic for lookup in addresses if lookup.values)
    may_count = False
    if not counts and alias is not None:
        counts, may_count = alias.is_secure(), alias.unknown()
    if tlsa is None or not (counts or may_count):
        return NO_TLSA
    if tlsa.unknown():
        return UNKNOWN_TLSA
    if not tlsa.is_secure():
        return NO_TLSA
    if not counts:
        return UNKNOWN_TLSA
    return Tlsa(Tlsa.RECORDS, tlsa.values[:DNS_TLSA_MAX], None)


def literal_target(wire_name):
    """The IP address that an MX record has in the place of a name, or None.
    Not allowed, but qmail-remote delivers to it (dns.c)."""
    if not wire_name[1:2].isdigit():
        return None
    return canonical(host_text(wire_name) or b'')


def better_than_own(located, is_own):
    """A Located without the exchangers that are not strictly better than the
    best one that is this host (RFC 5321 5.1)."""
    limit = next((exchanger.preference
                  for exchanger in in_order(located.exchangers)
                  if any(is_own(address) for address in exchanger.addresses)),
                 None)
    if limit is None:
        return located
    better = [exchanger for exchanger in located.exchangers
              if exchanger.preference < limit]
    report = b''
    if not better:
        report = DNS_TEMPORARY if min(located.unsure, default=limit) < limit \
            else OWN_ADDRESS
    return Located(better, report, located.unsure, located.late,
                   located.next_hop)


def shuffled(values):
    """The values in an unpredictable order."""
    return sorted(values, key=lambda value: os.urandom(4))


def in_order(exchangers):
    """Exchangers by preference; equal ones in random order (RFC 5321 5.1)."""
    return sorted(shuffled(exchangers),
                  key=lambda exchanger: exchanger.preference)


class OwnAddresses:
    """Tells whether an address is this host's.  is_local(address) is the
    kernel's view; more and less are moreipme and notipme, as
    parse_networks() returns them."""

    def __init__(self, more, less, is_local):
        self.more, self.less, self.is_local = more, less, is_local

    def __call__(self, address):
        if in_networks(address, self.less):
            return False
        return address in (b'::', b'::1') or \
            address.startswith((b'0.', b'127.')) or \
            in_networks(address, self.more) or self.is_local(address)


def is_local(address):
    """Whether this host has the address; nothing is sent.  Raises OSError if
    no socket can be made."""
    return family_has(family_of(address), address)


def family_has(family, address):
    """is_local(), for an address of this family.

    That a socket can be bound to an address proves nothing: with Linux'
    ip_nonlocal_bind each address can be bound.  So the kernel is asked for
    something that needs an interface with this very address.  IPv4: to
    choose an interface by its address (IP_MULTICAST_IF, ip(7)).  IPv6: to
    choose the source of a connection to the address; only an address of this
    host is its own source (RFC 6724 section 5, rule 1)."""
    try:
        sock = socket.socket(family, socket.SOCK_DGRAM)
    except OSError as error:
        if error.errno in LOCAL_ERRORS:
            raise
        return False            # this host has no such family
    try:
        if family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF,
                            packed(address))
            return True
        sock.connect((address, DISCARD_PORT))
        return sock.getsockname()[0].encode('ascii') == address
    except OSError:
        return False
    finally:
        sock.close()


class TcpTo:
    """queue/lock/tcpto, the table of servers that timed out (tcpto.c); IPv4
    only.  If anything is wrong with the file, deliveries do without it.

    clock is the wall clock in seconds; pid spreads the moment of the next
    try, as in tcpto.c; wait and monotonic: see section 12."""

    def __init__(self, path, clock, pid, wait, monotonic=time.monotonic):
        self.path, self.clock, self.pid = path, clock, pid
        self.wait, self.monotonic = wait, monotonic
        self.patience = TCPTO_WAIT      # seconds to wait for the lock
        self.listed = set()             # addresses that skip() found there

    def skip(self, address):
        """Whether the server timed out so recently that it is not tried."""
        def look(fd, table, at):
            if at is not None:
                self.listed.add(address)
            if at is None or table[at + 4] < TCPTO_SKIP_COUNT:
                return False
            return 0 <= self._age(table, at) < (60 + (self.pid & 31)) * 64
        return bool(self._locked(address, look))

    def timed_out(self, address):
        """Records a timeout, unless there was one less than TCPTO_FRESH
        seconds ago."""
        def note(fd, table, at):
            count = 1
            if at is None:
                at = self._free_place(table)
            elif table[at + 4]:
                if 0 <= self._age(table, at) < TCPTO_FRESH:
                    return
                count = min(table[at + 4] + 1, TCPTO_COUNT_MAX)
            table[at:at + 4] = packed(address)
            table[at + 4] = count
            struct.pack_into('<L', table, at + 8,
                             int(self.clock()) & 0xFFFFFFFF)
            os.pwrite(fd, table[at:at + TCPTO_SIZE], at)
        self._locked(address, note)

    def answered(self, address):
        """Clears the record of a server that did not time out."""
        def forget(fd, table, at):
            if at is not None and table[at + 4]:
                table[at + 4] = 0
                os.pwrite(fd, table[at:at + TCPTO_SIZE], at)
        if address in self.listed:
            self._locked(address, forget)

    def clear(self):
        """Clears all records; a file that is too short gets its full size
        (tcpto_clean.c)."""
        self._with_file(lambda fd: os.pwrite(
            fd, bytes(TCPTO_RECORDS * TCPTO_SIZE), 0))

    def _age(self, table, at):
        """Seconds since the record was written; negative if the clock has
        been set back.  Computed in 32 bits, so that 2106 does no harm."""
        then, = struct.unpack_from('<L', table, at + 8)
        age = (int(self.clock()) - then) & 0xFFFFFFFF
        return age - (1 << 32) if age >> 31 else age

    def _free_place(self, table):
        """Where the first unused record is; without any, the one with the
        least time + count * 1024 (tcpto.c)."""
        places = range(0, len(table), TCPTO_SIZE)
        for at in places:
            if not table[at + 4]:
                return at
        return min(places, key=lambda at: table[at + 4] * 1024 +
                   struct.unpack_from('<L', table, at + 8)[0])

    def _locked(self, address, action):
        """The result of action(fd, table, where the address is, or None),
        with the table locked; None if it cannot be, or for IPv6."""
        def read(fd):
            table = bytearray(os.pread(fd, TCPTO_RECORDS * TCPTO_SIZE, 0))
            del table[len(table) // TCPTO_SIZE * TCPTO_SIZE:]
            if not table:
                return None
            return action(fd, table, next(
                (at for at in range(0, len(table), TCPTO_SIZE)
                 if table[at:at + 4] == packed(address)), None))
        return None if b':' in address else self._with_file(read)

    def _lock(self, fd):
        """Locks the file.  Other deliveries hold the lock for microseconds.
        After TCPTO_WAIT seconds this one gives up, and does not wait for the
        lock again.  Raises OSError."""
        end = self.monotonic() + self.patience
        while True:
            try:
                return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                now = self.monotonic()
                if now >= end:
                    self.patience = 0
                    raise
            try:
                self.wait((), (), min(end, now + TCPTO_STEP))
            except TimedOut:
                pass

    def _with_file(self, action):
        """The result of action(fd), with the file locked; None if it cannot
        be."""
        fd = -1
        try:
            fd = os.open(self.path,
                         os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return None
            self._lock(fd)
            return action(fd)
        except OSError:
            return None
        finally:
            if fd >= 0:
                os.close(fd)


# -------------------------------------------------------------- 10. TLS policy
# What a server must prove, and whether its certificate does.  Nothing here
# touches a connection.  The ssl module is imported where it is needed: the
# import takes longer than all the rest of a start.

NO_SSL = b'this Python has no ssl module'
X509_PARTIAL_CHAIN = 0x80000    # openssl/x509_vfy.h; in ssl since Python 3.10
OP_LEGACY_SERVER_CONNECT = 4    # openssl/ssl.h; in ssl since Python 3.12
# Where no certificate is checked: the best ciphers first, then all others.
WEAK_CIPHERS = b'ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM:DHE+CHACHA20:ECDHE:' \
    b'DHE:ALL:!PSK:!SRP:!AESCCM:!ARIA'
DANE_TA, DANE_EE = 2, 3         # TLSA usages (RFC 7218 2.1)


class TlsPolicy(Record):
    """How a connection uses TLS, and what the server must prove.

    level       what trust holds, and what that means
    CLEAR       None: no TLS
    IF_OFFERED  None: TLS if the server offers it, with any certificate
    UNCHECKED   None: TLS or nothing is sent, with any certificate
    SYSTEM      None: a certificate that the system's trust store verifies
    FILE        PEM: one that the certificates in it verify, or one of them
    PINNED      PEM: one of those in it, whatever its name and age
    DANE        TLSA records: a certificate that they name, or whose issuer
    ANCHORS     certificates (DER), that DANE found: one that they verify
    CONFLICT    None: a password needs TLS, control/notlshosts forbids it

    From UNCHECKED on nothing is sent without TLS, from SYSTEM to ANCHORS
    nothing without a certificate that was verified."""
    __slots__ = ('level', 'trust')
    level: str
    trust: object
    CLEAR, IF_OFFERED, UNCHECKED = 'clear', 'if offered', 'unchecked'
    SYSTEM, FILE, PINNED, DANE, ANCHORS = \
        'system', 'file', 'pinned', 'dane', 'anchors'
    CONFLICT = 'conflict'

    @property
    def wanted(self):
        """Whether TLS is used if the server has it."""
        return self.level not in (self.CLEAR, self.CONFLICT)

    @property
    def required(self):
        """Whether nothing is sent without TLS."""
        return self.level not in (self.CLEAR, self.IF_OFFERED)

    @property
    def verified(self):
        """Whether the server's certificate must be verified."""
        return self.level in (self.SYSTEM, self.FILE, self.PINNED, self.DANE,
                              self.ANCHORS)

    @property
    def may_resume(self):
        """Whether a TLS session may be resumed.  What a resumed session
        proves is what the first one proved.  DANE must check anew, because
        the TLSA records may have changed, and so must what is tried after a
        failure."""
        return self.level not in (self.PINNED, self.DANE, self.ANCHORS)


def must_verify(server):
    """Whether a password for this Server needs TLS and a certificate that
    has been verified (rule 2).  Not on the ports of PORTS_MX, where most
    servers have no such certificate, and not to an address of this host,
    the near end of a tunnel, where the password cannot leave it."""
    return server.port not in PORTS_MX and server.address != b'::1' and \
        not server.address.startswith(b'127.')


def choose_tls(server, password, control):
    """The TlsPolicy for a Server, given whether a password is for it and
    its TlsControl.  What the administrator has laid down comes before DNS,
    and usable TLSA records before the system's trust store."""
    verify = password and must_verify(server)
    if control.pem is not None:
        return TlsPolicy(TlsPolicy.FILE, control.pem)
    if control.never:
        return TlsPolicy(TlsPolicy.CONFLICT if verify else TlsPolicy.CLEAR,
                         None)
    usable = [record for record in server.tlsa.records
              if dane_usable(record)]
    if usable:
        return TlsPolicy(TlsPolicy.DANE, usable)
    if verify:
        return TlsPolicy(TlsPolicy.SYSTEM, None)
    return TlsPolicy(TlsPolicy.UNCHECKED if server.tlsa.records
                     else TlsPolicy.IF_OFFERED, None)    # RFC 7672 2.2


def last_policy(policy, failed, port, password):
    """The TlsPolicy of the last connection to an address, after TlsFailed:
    with the issuers that DANE found; or only to see whether the certificate
    is one of those in tlshosts; or in the clear, if nothing forbids it.
    None if there is to be no other connection."""
    if failed.anchors:
        return TlsPolicy(TlsPolicy.ANCHORS, failed.anchors)
    if failed.certificate and policy.level == TlsPolicy.FILE:
        return TlsPolicy(TlsPolicy.PINNED, policy.trust)
    if policy.required or password or port == PORT_SMTPS:
        return None             # rule 2
    return TlsPolicy(TlsPolicy.CLEAR, None)


def tls_hint(policy, failed, password, name):
    """What an administrator can do about a TlsFailed, for the report: lines,
    or empty.  To trust another certificate is the way out only if the
    certificate was the reason."""
    if policy.level == TlsPolicy.FILE and failed.certificate:
        return TLS_FILE % name
    if policy.level == TlsPolicy.SYSTEM:
        return TLS_PASSWORD + (TLS_TRUST % name if failed.certificate
                               else b'')
    return TLS_CLEAR if password and not policy.required else b''


def limit_protocols(context, weak, tls12):
    """Sets the versions of TLS: 1.2 and up; if weak, all that OpenSSL has,
    and servers without secure renegotiation (RFC 5746), too.  tls12: TLS
    1.2 at most."""
    import ssl
    if weak:
        context.options |= OP_LEGACY_SERVER_CONNECT
    if hasattr(context, 'minimum_version'):     # novm: not in Python 3.6
        if weak:
            context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        elif context.minimum_version < ssl.TLSVersion.TLSv1_2:
            context.minimum_version = ssl.TLSVersion.TLSv1_2
        if tls12:
            context.maximum_version = ssl.TLSVersion.TLSv1_2
    else:
        if not weak:
            context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
        if tls12:
            context.options |= getattr(ssl, 'OP_NO_TLSv1_3', 0)


def choose_ciphers(context, weak, ciphers):
    """Sets the ciphers up to TLS 1.2, and OpenSSL's security level.

    ciphers is the list of the control file, or empty.  Without one: if
    weak, WEAK_CIPHERS, else what Python and the system have chosen.  The
    level is 0 if weak, else never 0.  Raises OSError or ValueError."""
    if not weak and not ciphers:
        return
    # A cipher without a certificate would leave OpenSSL nothing to check.
    names = (ciphers or WEAK_CIPHERS).decode('ascii') + ':!aNULL:!eNULL'
    if not weak:
        context.set_ciphers(names.replace('@SECLEVEL=0', '@SECLEVEL=1'))
        return
    try:
        context.set_ciphers('@SECLEVEL=0:' + names)
    except OSError:             # LibreSSL and OpenSSL 1.0 have no levels
        context.set_ciphers(names)


def tls_context(policy, control, tls12=False):
    """An SSLContext for a TlsPolicy and a TlsControl; tls12: for TLS 1.2 at
    most.  Where no certificate is checked, weak TLS is better than none
    (RFC 7435 section 3).  Raises ImportError if this Python has no ssl
    module, LocalFault if a control file is of no use."""
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.options |= getattr(ssl, 'OP_NO_RENEGOTIATION', 0)
    weak = not policy.verified
    limit_protocols(context, weak, tls12)
    try:
        choose_ciphers(context, weak, control.ciphers)
        if control.cert:        # a path: Python's ssl takes nothing else
            context.load_cert_chain(control.cert.decode('ascii'),
                                    password=lambda: '')
        if policy.level == TlsPolicy.FILE:
            context.load_verify_locations(
                cadata=policy.trust.decode('ascii', 'ignore'))
    except (OSError, ValueError) as error:      # SSLError is an OSError
        raise LocalFault(NO_CONTROL) from error
    if policy.level in (TlsPolicy.SYSTEM, TlsPolicy.FILE, TlsPolicy.ANCHORS):
        let_openssl_verify(context, policy)
    return context              # PINNED, DANE: Session.verify_peer() checks


def let_openssl_verify(context, policy):
    """Makes a certificate that does not verify fail the handshake."""
    import ssl
    if policy.level == TlsPolicy.SYSTEM:
        context.set_default_verify_paths()
    else:
        # Trust may end at the server's own certificate, or at any CA's.
        context.verify_flags |= X509_PARTIAL_CHAIN
    if policy.level == TlsPolicy.ANCHORS:
        for certificate in policy.trust:
            try:
                context.load_verify_locations(cadata=certificate)
            except (OSError, ValueError):
                pass            # one issuer less: the check gets no easier
    context.verify_mode = ssl.CERT_REQUIRED
    # With ANCHORS there may be two names, of which OpenSSL would check one;
    # Session.verify_peer() checks them.
    context.check_hostname = policy.level != TlsPolicy.ANCHORS


class TlsCache:
    """What a process that makes many sessions remembers about TLS.

    contexts        SSLContexts, by all that they are made from
    sessions        SSLSessions to resume, by context, address, port, name
    tls12_only      addresses of servers that get TLS 1.2 at most, because
                    they did not answer the hello of TLS 1.3

    Each of them holds TLS_KEPT entries at most, and is emptied then."""

    def __init__(self):
        self.contexts, self.sessions, self.tls12_only = {}, {}, set()

    def context(self, policy, control, tls12=False):
        """As tls_context(); a context of an earlier call where it fits."""
        if not policy.may_resume:
            return tls_context(policy, control, tls12)
        key = policy.level, policy.trust, control.cert, control.ciphers, tls12
        if key not in self.contexts:
            if len(self.contexts) >= TLS_KEPT:
                # A session belongs to its context.
                self.contexts, self.sessions = {}, {}
            self.contexts[key] = tls_context(policy, control, tls12)
        return self.contexts[key]

    def limit_to_tls12(self, address):
        """Remembers that this server needs TLS 1.2 at most."""
        if len(self.tls12_only) >= TLS_KEPT:
            self.tls12_only.clear()
        self.tls12_only.add(address)

    def is_limited(self, address):
        """Whether this server gets TLS 1.2 at most."""
        return address in self.tls12_only

    def find_session(self, key):
        """The SSLSession to resume, or None."""
        return self.sessions.get(key)

    def drop_session(self, key):
        """Forgets a session.  Returns whether there was one."""
        return self.sessions.pop(key, None) is not None

    def keep_session(self, key, session):
        """Keeps an SSLSession if it can be resumed (None: there is none).
        Raises ValueError if OpenSSL cannot write it down."""
        if session is not None and session.has_ticket:
            if len(self.sessions) >= TLS_KEPT:
                self.sessions.clear()
            self.sessions[key] = session


def trust_store():
    """The paths of the system's trust store, a file and a directory, whether
    they exist or not; [] if this Python has no ssl module."""
    try:
        import ssl
    except ImportError:
        return []
    paths = ssl.get_default_verify_paths()
    return [paths.cafile or paths.openssl_cafile,
            paths.capath or paths.openssl_capath]


def pem_certificates(pem):
    """The certificates of a PEM file, in DER (RFC 7468).  One that is
    damaged is left out."""
    import binascii
    found = []
    for part in pem.split(b'-----BEGIN CERTIFICATE-----')[1:]:
        body = part.split(b'-----END CERTIFICATE-----')[0]
        try:
            found.append(binascii.a2b_base64(body))
        except ValueError:
            pass
    return found


def is_for(certificate, names):
    """Whether a certificate is for one of the names (bytes, lower case).
    certificate is what getpeercert() returns.  One of its DNS names is equal
    to the name, or has * in the place of the first label (RFC 7672
    3.2.3)."""
    for kind, text in certificate.get('subjectAltName', ()):
        if kind != 'DNS':
            continue
        shown = text.encode('utf-8', 'replace').lower()
        star, _, parent = shown.partition(b'.')
        is_wildcard = star == b'*' and b'.' in parent
        for name in names:
            if shown == name or \
                    (is_wildcard and parent == name.partition(b'.')[2]):
                return True
    return False


class DerItem(Record):
    """Where an item of DER stands in the data (X.690 8.1)."""
    __slots__ = ('tag', 'start', 'end')
    tag: int
    start: int                  # of the contents
    end: int                    # behind them: the next item begins here


def der_item(data, at):
    """The DerItem that begins at that offset.  Raises ValueError."""
    if at + 2 > len(data):
        raise ValueError('DER ends')
    tag, size, start = data[at], data[at + 1], at + 2
    if size > 127:              # the long form: so many bytes hold the size
        start += size & 127
        size = int.from_bytes(data[at + 2:start], 'big')
    if start + size > len(data):
        raise ValueError('DER ends')
    return DerItem(tag, start, start + size)


def public_key(certificate):
    """The subjectPublicKeyInfo of a certificate, all in DER (RFC 5280 4.1):

        Certificate = SEQUENCE of
            tbsCertificate = SEQUENCE of
                version [0], which version 1 leaves out
                serialNumber, signature, issuer, validity, subject
                subjectPublicKeyInfo
                ...

    Raises ValueError."""
    to_be_signed = der_item(certificate, der_item(certificate, 0).start)
    at = to_be_signed.start
    first = der_item(certificate, at)
    if first.tag == 0xA0:               # the version
        at = first.end
    for _ in 'serialNumber', 'signature', 'issuer', 'validity', 'subject':
        at = der_item(certificate, at).end
    return certificate[at:der_item(certificate, at).end]


def is_sequence(data):
    """Whether data is one SEQUENCE in DER, as keys and certificates are."""
    try:
        item = der_item(data, 0)
        return item.tag == 0x30 and item.end == len(data)
    except ValueError:
        return False


def is_certificate(data):
    """Whether OpenSSL takes data for a certificate in DER."""
    try:
        import ssl
    except ImportError:
        return False
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=data)
    except (OSError, ValueError):   # Python 3.6 raises after it has loaded it
        pass
    return context.cert_store_stats()['x509'] == 1


def dane_usable(record):
    """Whether a TLSA record can decide (RFC 7672 3.1): its usage is 2 or 3,
    and its data can be what selector and matching say.  With usage 2 the
    record must hold a certificate, or this Python must show the issuers'
    certificates that a server sends."""
    usage, selector, matching, data = record
    if usage not in (DANE_TA, DANE_EE):
        return False
    if usage == DANE_TA and not is_anchor(record) and not can_show_chain():
        return False
    return dane_data_fits(selector, matching, data)


def dane_data_fits(selector, matching, data):
    """Whether the data can be what selector (0 a certificate, 1 its key) and
    matching (0 itself, 1 its SHA-256, 2 its SHA-512) say (RFC 6698 2.1)."""
    if selector not in (0, 1):
        return False
    if matching == 0:
        return is_sequence(data) and (selector == 1 or is_certificate(data))
    return (matching, len(data)) in ((1, 32), (2, 64))


def is_anchor(record):
    """Whether a TLSA record holds the certificate of an issuer."""
    usage, selector, matching, _ = record
    return (usage, selector, matching) == (DANE_TA, 0, 0)


def dane_match(record, certificate):
    """Whether a usable TLSA record means this certificate (RFC 6698 2.1)."""
    _, selector, matching, data = record
    try:
        chosen = public_key(certificate) if selector == 1 else certificate
    except ValueError:
        return False
    if matching:
        import hashlib
        chosen = hashlib.new('sha256' if matching == 1 else 'sha512',
                             chosen).digest()
    return chosen == data


def dane_check(records, chain):
    """Checks the certificates of a server (DER, its own first) against its
    usable TLSA records (RFC 7672 3.1).

    Returns if usage 3 names the server's own certificate: its name and age
    do not matter then.  Else raises TlsFailed.  If usage 2 names issuers,
    TlsFailed.anchors holds their certificates: a second handshake has to
    verify the server's certificate with them."""
    issuers = set()
    for record in records:
        usage, _, _, data = record
        if usage == DANE_EE and dane_match(record, chain[0]):
            return
        if is_anchor(record):
            issuers.add(data)
        if usage == DANE_TA:
            issuers.update(certificate for certificate in chain
                           if dane_match(record, certificate))
    raise TlsFailed(b'no TLSA record matches the certificate',
                    sorted(issuers))


def can_show_chain():
    """Whether this Python shows all certificates that a server sends: by a
    documented method since 3.13, by one of its C half since 3.10."""
    try:
        import ssl
    except ImportError:
        return False
    return hasattr(ssl.SSLObject, 'get_unverified_chain') or \
        hasattr(ssl._ssl._SSLSocket,            # type: ignore
                'get_unverified_chain')


def shown_chain(ssl_object):
    """The certificates that a server has sent, in DER, its own first; only
    its own where Python does not show the others."""
    own = ssl_object.getpeercert(True)
    if hasattr(ssl_object, 'get_unverified_chain'):
        return [own] + list(ssl_object.get_unverified_chain())
    if not can_show_chain():
        return [own]
    from _ssl import ENCODING_DER
    return [own] + [certificate.public_bytes(ENCODING_DER) for certificate
                    in ssl_object._sslobj.get_unverified_chain()]


# ----------------------------------------------------------------- 11. Replies
# The grammar of replies, EHLO, what of a reply may be shown, and the encodings
# of AUTH.  Pure.

class Reply(Record):
    """A whole reply of a server."""
    __slots__ = ('code', 'text')
    code: int                   # 200 to 599, of the last line
    text: bytes                 # all lines with their codes; no CRs, LF ends

    def kind(self):
        """The first digit of the code (RFC 5321 4.2.1)."""
        return self.code // 100


class ReplyReader:
    """Reads one reply (RFC 5321 4.2.1) from pieces of any size.

    line        the line under way, REPLY_KEPT bytes of it at most
    text        the lines before, twice as many bytes at most
    code        that of the last whole line; None before the first one
    size        bytes read, REPLY_SIZE_MAX at most
    lenient     lines without a code are passed over, but not the first"""
    __slots__ = ('line', 'text', 'code', 'size', 'lenient')

    def __init__(self, lenient=False):
        self.line, self.text, self.code = bytearray(), bytearray(), None
        self.size, self.lenient = 0, lenient

    def take(self, data):
        """Reads data (bytes).  Returns how many bytes of data the reply
        needed to its end, or None if it does not end in data.  Raises
        ProtocolError as soon as this cannot be a reply."""
        start = 0
        while True:
            end = data.find(b'\n', start)
            piece = data[start:] if end < 0 else data[start:end]
            self.size += len(piece) + (end >= 0)
            if self.size > REPLY_SIZE_MAX:
                raise ProtocolError(b'a reply without end')
            self.line += piece[:max(0, REPLY_KEPT - len(self.line))]
            has_code = self._has_code(end >= 0)
            if end < 0:
                return None
            start = end + 1
            if self._end_line(has_code):
                return start

    def reply(self):
        """The Reply, once take() has found its end."""
        return Reply(self.code, bytes(self.text))

    def _has_code(self, ended):
        """Whether the line begins with a code; before it has ended: whether
        it still may.  Raises ProtocolError if it must, and does not, or if
        its code is of another class than those before."""
        line = self.line.rstrip(b'\r') if ended else self.line
        has_code = is_whole_code(line) if ended else may_be_code(line)
        may_lack_code = self.lenient and self.code is not None
        if may_lack_code and not (ended and has_code):
            return has_code
        if not has_code or self._is_other_class(line):
            raise ProtocolError(b'no SMTP reply')
        return has_code

    def _is_other_class(self, line):
        """Whether the first digit, if there is one, differs from the one on
        the lines before."""
        return self.code is not None and \
            line[:1] not in (b'', b'%d' % (self.code // 100))

    def _end_line(self, has_code):
        """Begins the next line.  Returns whether this one was the last."""
        is_last = has_code and self.line[3:4] != b'-'
        if has_code:
            self.code = int(self.line[:3])
        if len(self.text) < REPLY_KEPT:
            self.text += self.line.replace(b'\r', b'') + b'\n'
        self.line = bytearray()
        return is_last


def may_be_code(line):
    """Whether an unfinished line begins with a code from 200 to 599, and a
    blank, hyphen, tab or CR behind it, or may do so when there is more."""
    digits, mark = line[:3], line[3:4]
    return (not digits or digits.isdigit()) and \
        digits[:1] in (b'', b'2', b'3', b'4', b'5') and \
        mark in (b'', b' ', b'-', b'\t', b'\r')


def is_whole_code(line):
    """Whether a whole line, without the CRs at its end, begins with a code as
    above, and a blank, hyphen, tab or nothing behind it."""
    return len(line) >= 3 and line[3:4] != b'\r' and may_be_code(line)


def parse_ehlo(text):
    """{keyword: list of parameters}, all in upper case, from the text of an
    EHLO reply (RFC 5321 4.1.1.1).  AUTH=LOGIN counts as AUTH LOGIN.  The
    parameters of several lines with one keyword add up."""
    offered = {}
    for line in text.split(b'\n')[1:]:
        words = line[4:].upper().replace(b'AUTH=', b'AUTH ').split()
        if words:
            offered.setdefault(words[0], []).extend(words[1:])
    return offered


class Redactor:
    """Keeps user and password out of all that is shown.  No other code knows
    the forms in which a server could send them back.

    user        as configured, or empty
    secrets     the password; base64 of what AUTH sends; digests"""

    def __init__(self, credentials=None):
        self.user, self.secrets = b'', []
        if credentials is not None:
            self.user, password = credentials
            self.secrets.append(password)
            for value in (self.user, password,
                          b'\0' + self.user + b'\0' + password):
                self.add(base64(value))

    def add(self, secret):
        """Adds a digest or a base64 text, with and without the = at its
        end."""
        self.secrets += [secret, secret.rstrip(b'=')]

    def hide(self, text, user=True):
        """text with *** in the place of each secret; if user is true, of the
        user, too."""
        secrets = [secret for secret in self.secrets +
                   [self.user if user else b''] if secret]
        hidden = mark_places(text, secrets)
        shown = bytearray()
        for at, byte in enumerate(text):
            if not hidden[at]:
                shown.append(byte)
            elif at == 0 or not hidden[at - 1]:
                shown += b'***'
        if len(text) >= REPLY_KEPT and secrets:
            # ReplyReader may have cut a secret at the end.
            del shown[-max(map(len, secrets)):]
        return bytes(shown)

    def auth_reply(self, reply):
        """The Reply to a step of AUTH, *** in the place of each line that
        shares SECRET_PART bytes in a row with a secret, or all of a shorter
        secret: servers fold and cut what they echo.  The codes stay."""
        parts = {secret[at:at + SECRET_PART]
                 for secret in self.secrets if secret
                 for at in range(max(1, len(secret) - SECRET_PART + 1))}
        lines = reply.text.split(b'\n')
        for index, line in enumerate(lines):
            text = line[4:]
            if not parts.isdisjoint(text[at:at + size]
                                    for size in range(1, SECRET_PART + 1)
                                    for at in range(len(text))):
                lines[index] = line[:4] + b'***'
        return Reply(reply.code, b'\n'.join(lines))


def mark_places(text, secrets):
    """A bytearray as long as text; not 0 where a byte belongs to one of the
    secrets.  They may overlap."""
    marked = bytearray(len(text))
    for secret in secrets:
        at = text.find(secret)
        while at >= 0:
            marked[at:at + len(secret)] = b'\1' * len(secret)
            at = text.find(secret, at + 1)
    return marked


def reply_text(reply, redactor):
    """The lines of a reply for a report, without secrets, REPLY_MAX bytes at
    most."""
    text = redactor.hide(reply.text)[:REPLY_MAX].rstrip(b'\n')
    return b'Remote host said: ' + text + b'\n'


def reply_summary(reply, redactor):
    """The first line of a reply for the attempt log, without secrets and
    without line end, SUMMARY_MAX bytes at most."""
    text = redactor.hide(reply.text)
    return text.split(b'\n', 1)[0][:SUMMARY_MAX].rstrip()


def permanent(reply):
    """Whether a refusal is permanent.  530 is not: it asks for TLS or for a
    password first (RFC 4954 section 6), so our configuration is the
    reason."""
    return reply.kind() == 5 and reply.code != 530


def about_security(reply):
    """Whether the text of a reply holds an enhanced code X.7.x (RFC 3463
    3.8), at any place of a line."""
    for line in reply.text.split(b'\n'):
        for word in line[4:].split():
            numbers = word.strip(b'#()[]<>:;,.-').split(b'.')
            if len(numbers) == 3 and numbers[0] in (b'4', b'5') and \
                    numbers[1] == b'7' and numbers[2].isdigit():
                return True
    return False


def base64(data):
    """data in base64 (RFC 4648 section 4), one line.  The base64 module is
    not used: its import takes too long."""
    import binascii
    return binascii.b2a_base64(data)[:-1]


def unbase64(text):
    """What base64() makes text of; blanks around it do not count.  Raises
    ValueError for anything else."""
    import binascii
    text = text.strip()
    data = binascii.a2b_base64(text)
    if base64(data) != text:
        raise ValueError('not base64')
    return data


def has_md5():
    """Whether this Python can compute MD5: some systems forbid it."""
    try:
        hmac_md5(b'', b'')
        return True
    except (ImportError, ValueError):
        return False


def hmac_md5(key, text):
    """HMAC-MD5 (RFC 2104) in hexadecimal.  Raises ImportError or ValueError
    if this Python has no MD5."""
    import hmac
    return hmac.new(key, text, 'md5').hexdigest().encode()


# -------------------------------------------------------------- 12. Connection
# A socket with deadlines, and TLS over it.  wait() is the only code that
# waits.

class Launcher:
    """The process that must stay alive: the sh that started us.  An
    administrator kills that one, and then qmail-rspawn does not believe our
    report any more.  pid: its process id; None: there is none."""

    def __init__(self, pid):
        self.pid = pid

    def is_dead(self):
        return self.pid is not None and os.getppid() != self.pid


LAUNCHER = Launcher(os.getppid() if 'under_sh' in sys._xoptions else None)


def wait(reading, writing, deadline, clock=time.monotonic):
    """Waits until one of the sockets or descriptors is ready.  Returns two
    lists: those to read, those to write.  Raises TimedOut at the deadline,
    by clock, even if one is ready: a peer that drips must not outlive it.
    Raises LocalFault if the launcher has been killed."""
    while True:
        left = deadline - clock()
        if left <= 0:
            raise TimedOut()
        if LAUNCHER.is_dead():
            raise LocalFault(KILLED)
        ready = select.select(reading, writing, (), min(left, ORPHAN_CHECK))
        if ready[0] or ready[1]:
            return ready[0], ready[1]


def connect(address, port, seconds, source=None):
    """A connected socket that does not block; source is the address to
    connect from (None: the kernel's choice).  Raises TimedOut, OSError, and
    LocalFault if this host has no socket left, or not that source."""
    deadline = time.monotonic() + seconds
    try:
        sock = socket.socket(family_of(address), socket.SOCK_STREAM)
        try:
            start_connection(sock, address, port, deadline, source)
            return sock
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        if error.errno in LOCAL_ERRORS:
            raise LocalFault(NO_RESOURCES) from error
        if error.errno == errno.ETIMEDOUT:
            raise TimedOut() from error
        raise


def start_connection(sock, address, port, deadline, source):
    """Connects a new socket.  Raises what connect() raises, and OSError for
    what connect() takes for a fault of this host."""
    sock.setblocking(False)
    if source is not None:
        bind_source(sock, source)
    try:
        sock.connect((address, port))
    except BlockingIOError:
        wait((), (sock,), deadline)
    raise_error_of(sock)
    # Each send() is a whole command or a large piece of the message:
    # Nagle's algorithm would only delay it.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def bind_source(sock, source):
    """Makes source (an address) the socket's own.  Raises LocalFault if this
    host has no such address, and OSError if it has no socket left to find
    that out."""
    if not is_local(source) and source not in (b'0.0.0.0', b'::'):
        raise LocalFault(NOT_OURS % (source, b'not an address of this host'))
    if sys.platform == 'linux':
        # The kernel chooses the port when it knows the peer.  Chosen before,
        # it could serve one connection at a time.
        try:
            sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        except OSError:
            pass
    try:
        sock.bind((source, 0))
    except OSError as error:
        raise LocalFault(NO_RESOURCES) from error


class Connection:
    """A socket with deadlines: sends bytes, reads whole replies.

    sock        a connected socket that does not block
    wait, clock     as wait(), time.monotonic()
    input       received (decrypted), not yet read as a reply
    ended       nothing more can be received
    failure     the diagnostic of what ended it; empty: the peer closed it
    tls         the TlsLayer, once the handshake is done; None before
    pending_tls_output  what TLS itself has to send, for the next send()

    After a failure nothing more is sent.  What the server had sent before
    can still be read with reply().  When nothing is left, each method raises
    ConnectionLost."""

    def __init__(self, sock, wait=wait, clock=time.monotonic):
        self.sock, self.wait, self.clock = sock, wait, clock
        self.input, self.ended, self.failure = bytearray(), False, b''
        self.tls, self.pending_tls_output = None, b''

    def start_tls(self, context, name, seconds, verify_peer, session=None):
        """The TLS handshake, within seconds.

        name (bytes, or None) is what to ask for (SNI), and to check if the
        context says so.  verify_peer(TlsLayer) returns if the certificate is
        good enough, else raises TlsFailed.  session is an SSLSession of this
        context to resume, or None.  Raises TlsFailed; ProtocolError if the
        peer has sent something in the clear before: read after the
        handshake, it would pass for encrypted (RFC 3207, CVE-2011-0411)."""
        closed = self.input_pending()
        if self.input:
            raise ProtocolError(b'spoke in the clear before the TLS '
                                b'handshake')
        if closed:
            raise TlsFailed(self.failure or b'connection closed',
                            silent=True)
        try:
            layer = TlsLayer(context, name, session)
        except (OSError, ValueError) as error:
            raise TlsFailed(tls_reason(error)) from error
        self._handshake(layer, self.clock() + seconds)
        verify_peer(layer)
        # What came with the last bytes of the handshake is decrypted after
        # verify_peer(): if it is damaged, OpenSSL forgets the certificate.
        try:
            plain, self.ended = layer.decrypt()
        except ConnectionLost as lost:
            raise TlsFailed(lost.diagnostic) from lost
        self.input += plain
        self.tls = layer

    def _handshake(self, layer, deadline):
        """Raises TlsFailed."""
        answered = done = False
        try:
            while not done:
                try:
                    done = layer.handshake()
                except TlsFailed:
                    self.send_best_effort(layer.output())   # a TLS alert
                    raise
                self._push(layer.output(), deadline)
                if not done:
                    layer.incoming.write(self._receive(deadline))
                    answered = True
        except ConnectionLost as lost:
            raise TlsFailed(lost.diagnostic, silent=not answered or
                            self.clock() >= deadline) from lost

    def send(self, data, seconds, stop_on_input=False):
        """Sends data within seconds.  Returns True if all of it is out;
        False if the connection was lost, but input came before that, or,
        with stop_on_input, if there is input.  Raises ConnectionLost if the
        connection is lost and there is no input to read.

        Input is received meanwhile: else a peer that answers at once could
        be stuck in a send of its own, and not receive ours."""
        deadline = self.clock() + seconds
        try:
            if self.tls:
                data = self._encrypt(self.tls, data, deadline)
            return self._push(data, deadline, True, stop_on_input)
        except ConnectionLost as lost:
            self._drain_input(lost.diagnostic)
            if not self.input:
                raise
            return False

    def _encrypt(self, tls, data, deadline):
        """What has to go out for data: first what TLS itself has to send,
        then data, encrypted."""
        while not tls.encrypt(data):       # a renegotiation
            output = self.pending_tls_output + tls.output()
            self.pending_tls_output = b''
            self._push(output, deadline)
            self.input += tls.decrypt(self._receive(deadline))[0]
        data = self.pending_tls_output + tls.output()
        self.pending_tls_output = b''
        return data

    def _receive(self, deadline):
        """The next bytes from the socket, at least one.  Raises
        ConnectionLost at its end."""
        while True:
            self._wait(True, False, deadline)
            try:
                data = self.sock.recv(INPUT_BLOCK)
            except BlockingIOError:
                continue
            except OSError as error:
                raise ConnectionLost(error_text(error)) from error
            if not data:
                raise ConnectionLost(b'connection closed')
            return data

    def _push(self, data, deadline, take_input=False, stop_on_input=False):
        """Sends bytes as they are; returns and raises as send() does.
        take_input: receives meanwhile."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self.sock.send(rest):]
                continue
            except BlockingIOError:
                pass
            except OSError as error:
                raise ConnectionLost(error_text(error)) from error
            if stop_on_input and self.input_pending():
                return False
            has_room = take_input and not self.ended and \
                len(self.input) < BACKLOG_MAX
            if has_room and self._fill() and self.clock() < deadline:
                continue
            self._wait(has_room, True, deadline)
        return True

    def input_pending(self):
        """Whether there is input that was not read as a reply, or the
        connection has ended."""
        for _ in range(IDLE_MAX):
            if self.input or self.ended or not self._fill():
                break
        return bool(self.input) or self.ended

    def require_silence(self):
        """Raises ProtocolError if there is input, which can be no reply yet,
        and ConnectionLost if the connection has ended."""
        if self.input_pending():
            if self.input:
                raise ProtocolError(b'spoke out of turn')
            raise ConnectionLost(self.failure or b'connection closed')

    def _drain_input(self, diagnostic):
        """Receives what a lost connection still holds.  Nothing is received
        after that."""
        for _ in range(IDLE_MAX):
            if self.ended or len(self.input) >= BACKLOG_MAX or \
                    not self._fill():
                break
        self.ended, self.failure = True, diagnostic

    def send_best_effort(self, data):
        """Sends what can be sent without waiting.  A failure changes
        nothing."""
        try:
            if not self.failure:
                if self.tls:
                    data = self._encrypt(self.tls, data, self.clock())
                self.sock.send(data)
        except (OSError, ConnectionLost):
            pass

    def close(self):
        self.sock.close()

    def _fill(self):
        """Receives without waiting.  Returns False if there is nothing to
        receive.  Must not be called once the connection has ended."""
        try:
            data = self.sock.recv(INPUT_BLOCK)
            self.ended = not data
            if self.tls:
                data, self.ended = self.tls.decrypt(data)
                self.pending_tls_output += self.tls.output()
                if len(self.pending_tls_output) > REPLY_KEPT:
                    raise ProtocolError(
                        b'asks for new TLS keys without end')
            self.input += data
        except BlockingIOError:
            return False
        except OSError as error:
            self.ended, self.failure = True, error_text(error)
        except ConnectionLost as lost:
            self.ended, self.failure = True, lost.diagnostic
        return True

    def reply(self, seconds, lenient=False):
        """The next Reply, whole, within seconds; lenient: see ReplyReader.
        Raises ConnectionLost or ProtocolError.

        It waits before each receive, so that it sees the deadline even if
        the peer never stops.  It receives once more after the deadline: if
        this process was stopped meanwhile, the reply may be there."""
        deadline, reader = self.clock() + seconds, ReplyReader(lenient)
        timed_out = None
        while True:
            used = reader.take(self.input)
            if used is not None:
                del self.input[:used]
                return reader.reply()
            self.input = bytearray()
            if self.ended:
                raise ConnectionLost(self.failure or b'connection closed')
            if timed_out is not None:
                raise timed_out
            self._push_tls_output()
            try:
                self._wait(True, False, deadline)
            except ConnectionLost as lost:
                timed_out = lost
            self._fill()

    def _push_tls_output(self):
        """Sends what TLS itself has to send (the answer to a key update),
        without waiting.  What is left goes out with the next send()."""
        try:
            if self.pending_tls_output:
                sent = self.sock.send(self.pending_tls_output)
                self.pending_tls_output = self.pending_tls_output[sent:]
        except OSError:
            pass

    def _wait(self, reading, writing, deadline):
        """Waits until the socket is ready.  Raises ConnectionLost at the
        deadline."""
        try:
            self.wait((self.sock,) if reading else (),
                      (self.sock,) if writing else (), deadline)
        except TimedOut as error:
            raise ConnectionLost(b'timed out') from error


def error_text(error):
    """An OSError in a few words (bytes), for the attempt log."""
    return os.strerror(error.errno or errno.EIO).lower().encode()


class TlsLayer:
    """TLS between a Connection and its socket: bytes in, bytes out, all in
    memory.  It never waits, and does not touch the socket.

    incoming    an ssl.MemoryBIO: what the server has sent
    outgoing    an ssl.MemoryBIO: what has to go to the server
    needs_input     the exception that means: more has to come in first
    ssl_object  the ssl.SSLObject between the two"""

    def __init__(self, context, name, session=None):
        """Raises OSError or ValueError, for a name that ssl refuses."""
        import ssl
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.needs_input = ssl.SSLWantReadError
        # Python 3.6 checks certificates only for a name that is str.  As
        # bytes it needs no IDNA codec, which takes long to import.
        if name and context.verify_mode != ssl.CERT_NONE:
            name = name.decode('ascii')
        self.ssl_object = context.wrap_bio(
            self.incoming, self.outgoing, server_hostname=name,
            session=session)

    def handshake(self):
        """Goes on with the handshake.  Returns True when it is done, False
        if more has to come in first.  Raises TlsFailed."""
        try:
            self.ssl_object.do_handshake()
            return True
        except self.needs_input:
            return False
        except (OSError, ValueError) as error:  # SSLError, CertificateError
            raise TlsFailed(
                tls_reason(error),
                certificate=is_verification_error(error)) from error

    def encrypt(self, data):
        """Returns True when output() has data, False if more has to come in
        first (a renegotiation).  Raises ConnectionLost."""
        try:
            if self.ssl_object.write(data) != len(data):
                raise ConnectionLost(b'TLS took only a part')
            return True
        except self.needs_input:
            return False
        except OSError as error:
            raise ConnectionLost(tls_reason(error)) from error

    def decrypt(self, data=None):
        """(plain text, whether it is the last) after data came in; None:
        nothing new.  Empty data mean that the connection has ended.  A
        missing close_notify is harmless: SMTP frames its own replies.
        Raises ConnectionLost."""
        ended, plain = data == b'', b''
        if data:
            self.incoming.write(data)
        elif ended:
            self.incoming.write_eof()
        try:
            while True:
                block = self.ssl_object.read(INPUT_BLOCK)
                if not block:
                    return plain, True
                plain += block
        except self.needs_input:
            return plain, ended
        except OSError as error:
            if plain or ended:
                return plain, True
            raise ConnectionLost(tls_reason(error)) from error

    def output(self):
        """What has to go to the server (bytes)."""
        return self.outgoing.read()

    def facts(self):
        """Protocol and cipher, for the report (bytes)."""
        return '{}, {}'.format(self.ssl_object.version(),
                               self.ssl_object.cipher()[0]).encode()


def is_verification_error(error):
    """Whether an error of the ssl module means that the server's certificate
    is not good enough."""
    import ssl
    return isinstance(error, ssl.CertificateError) or \
        getattr(error, 'reason', None) == 'CERTIFICATE_VERIFY_FAILED'


def tls_reason(error):
    """An error of the ssl module in a few words (bytes), for the report: one
    line of printable ASCII."""
    text = getattr(error, 'verify_message', None) or \
        (getattr(error, 'reason', None) or '').replace('_', ' ').lower() or \
        str(error) or 'TLS error'
    return bytes(c if 32 <= c <= 126 else 63
                 for c in str(text).encode('ascii', 'replace')).rstrip(b'.')


# ----------------------------------------------------------------- 13. Message
# Its form on the wire (pure), and the only code that reads fd 0.

def wire_form(blocks):
    """Yields the message, given in blocks of any size, as it goes over the
    wire (RFC 5321 4.5.2), without the end of the data.

    Why no message can hold an end of data (rule 4), however it is cut into
    blocks: A CR at the end of a block waits for the next block, so CR LF is
    always seen whole.  Then CR LF and each CR left become LF, and text has
    no CR any more.  So each line of text ends with LF, and each LF goes out
    as CR LF: no lone CR or LF leaves.  A line that begins with a dot begins
    after an LF of text or at its start after the end of a line; both get a
    second dot.  So no line that leaves is a lone dot.

    A CR at the end of the last block is never sent.  Message.blocks() has
    raised LocalFault then: the last line has no end."""
    line_start, held = True, b''
    for block in blocks:
        text = held + block
        held = b'\r' if text.endswith(b'\r') else b''
        text = text[:len(text) - len(held)]
        if not text:
            continue
        if b'\r' in text:
            text = text.replace(b'\r\n', b'\n').replace(b'\r', b'\n')
        dot = b'.' if line_start and text.startswith(b'.') else b''
        line_start = text.endswith(b'\n')
        yield dot + text.replace(b'\n.', b'\n..').replace(b'\n', b'\r\n')


class Message:
    """The message on a descriptor, from the place where it stands.

    fd          the descriptor; None if it was closed when we started
    timing      seconds for each SEND_PIECE to come in; wait; clock
    size        bytes, once check() has seen that it is a file; else None
    head        what scan() has read of a pipe; blocks() begins with it
    whole       head is all of the message
    scan_result     what scan() returns, once it has run; else None"""

    def __init__(self, fd, seconds=TIMEOUT_REMOTE, wait=wait,
                 clock=time.monotonic):
        self.fd, self.timing = fd, (seconds, wait, clock)
        self.size, self.scan_result = None, None
        self.head, self.whole = b'', False

    def check(self):
        """Raises LocalFault if it can be seen in advance that the message
        cannot be sent: it cannot be read, or its last line has no end."""
        if self.fd is None:
            raise LocalFault(NO_MESSAGE)
        try:
            start = os.lseek(self.fd, 0, 1)     # SEEK_CUR
            status = os.fstat(self.fd)
        except OSError:
            return              # a pipe: blocks() will see
        if not stat.S_ISREG(status.st_mode):
            return
        self.size = max(0, status.st_size - start)
        try:
            if self.size and os.pread(self.fd, 1, status.st_size - 1) != b'\n':
                raise LocalFault(PARTIAL_LINE)
        except OSError as error:
            raise LocalFault(NO_MESSAGE) from error

    def scan(self):
        """(bytes on the wire, whether there are 8-bit bytes among them),
        for SIZE and BODY=8BITMIME.  Of a pipe with more than PEEK_MAX bytes
        nothing is known: (None, True).  Raises LocalFault."""
        if self.scan_result is None:
            if self.size is not None:
                self.scan_result = scan_blocks(file_blocks(self.fd))
            else:
                head = self.read_if_small()
                self.scan_result = (None, True) if head is None else \
                    scan_blocks((head,))
        return self.scan_result

    def read_if_small(self):
        """Reads ahead: the whole message, or None if it has more than
        PEEK_MAX bytes.  Raises LocalFault."""
        if not self.whole and len(self.head) <= PEEK_MAX:
            for block in timed_blocks(self.fd, *self.timing):
                self.head += block
                if len(self.head) > PEEK_MAX:
                    return None
            self.whole = True
        if self.whole and self.head and not self.head.endswith(b'\n'):
            raise LocalFault(PARTIAL_LINE)
        return self.head if self.whole else None

    def wire_size(self):
        """Bytes on the wire as far as they are known, or None."""
        return self.size if self.scan_result is None else self.scan_result[0]

    def blocks(self):
        """Yields the message in blocks, as they come.  Raises LocalFault if
        it cannot be read, or at the end if the last line has no end."""
        last = b'\n'
        if self.head:
            last = self.head[-1:]
            yield self.head
        if not self.whole:
            for block in timed_blocks(self.fd, *self.timing):
                last = block[-1:]
                yield block
        if last != b'\n':
            raise LocalFault(PARTIAL_LINE)


def timed_blocks(fd, seconds, wait, clock):
    """Yields what a descriptor gives, to its end.  Each SEND_PIECE must come
    within seconds.  Raises LocalFault."""
    deadline, taken = clock() + seconds, 0
    while True:
        if taken >= SEND_PIECE:
            deadline, taken = clock() + seconds, 0
        try:
            wait((fd,), (), deadline)
            block = os.read(fd, MESSAGE_BLOCK)
        except BlockingIOError:
            continue
        except (OSError, TimedOut) as error:
            raise LocalFault(NO_MESSAGE) from error
        if not block:
            return
        taken += len(block)
        yield block


def file_blocks(fd):
    """Yields the rest of a file, and leaves its place as it is.  Raises
    LocalFault."""
    try:
        at = os.lseek(fd, 0, 1)                 # SEEK_CUR
        while True:
            block = os.pread(fd, MESSAGE_BLOCK, at)
            if not block:
                return
            at += len(block)
            yield block
    except OSError as error:
        raise LocalFault(NO_MESSAGE) from error


def scan_blocks(blocks):
    """(bytes on the wire, whether there are 8-bit bytes) of a message.  The
    size is an estimate where there are CRs, dots at the start of a line, or
    more than COUNTED_MAX bytes: RFC 1870 6.1 allows it."""
    size, lines, counted, plain = 0, 0, 0, True
    for block in blocks:
        if size < COUNTED_MAX:
            lines += block.count(b'\n')
            counted = size + len(block)
        size += len(block)
        plain = plain and is_ascii(block)
    if counted:
        size += -(-lines * size // counted)     # rounded up
    return size, not plain


def is_ascii(block):
    """Whether no byte is over 127; bytes.isascii() came with Python 3.7."""
    try:
        return block.isascii()
    except AttributeError:
        return not block.translate(None, bytes(range(128)))


def open_message(messid, owner):
    """A descriptor of queue/mess/messid, a regular file of this owner (a
    user id).  Raises LocalFault (spawn.c, docmd())."""
    try:
        fd = os.open(b'queue/mess/' + messid,
                     os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise LocalFault(SPAWN_NO_OPEN) from error
    try:
        check_message_file(fd, owner)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_message_file(fd, owner):
    """Raises LocalFault if it is no regular file of this owner (spawn.c)."""
    try:
        status = os.fstat(fd)
    except OSError as error:
        raise LocalFault(SPAWN_NO_FSTAT) from error
    if not stat.S_ISREG(status.st_mode):
        raise LocalFault(SPAWN_WRONG_TYPE)
    if status.st_uid != owner:
        raise LocalFault(SPAWN_WRONG_OWNER)


# ------------------------------------------------------------- 14. Session
# Session brings a connection to the point where MAIL may be said.  Then
# Transaction sends one message over it.  Both speak through one Dialogue,
# which knows how far the two sides are: sent is the last step that we have
# begun, replied the last one that the server has agreed to.  Neither ever
# goes back.  The legal sequence, in brackets what may be left out:
#
#   step      we send                     to go on, the reply must be
#   GREETING  nothing                     220
#   EHLO      EHLO [HELO]                 2xx (HELO only after 5xx)
#   TLS       [STARTTLS, handshake, EHLO] 220, 2xx
#   AUTH      [AUTH, answers]             235 (334 to each question)
#   MAIL      MAIL                        2xx: from here on its word is final
#   RCPT      RCPT, one or more           2xx to at least one
#   DATA      DATA                        354
#             the message                 nothing yet: a refusal ends it
#   END       the final dot               2xx: the server has the message
#   DONE      QUIT                        not waited for
#
# With PIPELINING, MAIL, RCPT and DATA leave together: sent is then ahead.

GREETING, EHLO, TLS, AUTH, MAIL, RCPT, DATA, END, DONE = range(9)
QUIT, END_OF_DATA = b'QUIT\r\n', b'.\r\n'
CANCEL = b'*\r\n'               # ends an AUTH exchange (RFC 4954 section 4)


class Dialogue:
    """Commands and replies on one Connection.  timeout: seconds for each
    reply, and for each SEND_PIECE to leave; redactor: a Redactor."""

    def __init__(self, connection, timeout, redactor, trace):
        self.connection, self.timeout = connection, timeout
        self.redactor, self.trace = redactor, trace
        self.sent = self.replied = GREETING

    @property
    def committed(self):
        """Whether the server has accepted MAIL."""
        return self.replied >= MAIL

    @property
    def in_doubt(self):
        """Whether the end of the data is out, and its reply is not in."""
        return self.sent == END and self.replied < END

    def advance(self, sent=GREETING, replied=GREETING):
        """Notes how far the two sides are now."""
        self.sent = max(self.sent, sent)
        self.replied = max(self.replied, replied)

    def command(self, step, line):
        """Sends one command (bytes, without CRLF) and returns its Reply."""
        self.send_pipelined([(step, line)])
        return self.reply()

    def exchange(self, commands, pipelining):
        """Yields the Reply to each of commands, pairs of a step and a line.
        All leave together if the server takes that (PIPELINING, RFC 2920),
        else each when its turn has come."""
        if pipelining:
            self.send_pipelined(commands)
        for step, line in commands:
            if not pipelining:
                self.send_pipelined([(step, line)])
            yield self.reply()

    def send_pipelined(self, commands):
        """Sends commands, pairs of a step and a line, as one group.  Input
        that is pending would be taken for their replies: ProtocolError.  If
        the connection dies meanwhile, replies that came before count."""
        for _, line in commands:
            if b'\r' in line or b'\n' in line or b'\0' in line:
                raise LocalFault(NO_RESOURCES)      # rule 4 again
        self.connection.require_silence()
        self.show(Trace.SENT, b'\n'.join(line for _, line in commands))
        group = memoryview(b''.join(line + b'\r\n' for _, line in commands))
        self.advance(sent=commands[-1][0])
        for at in range(0, len(group), SEND_PIECE):
            if not self.connection.send(group[at:at + SEND_PIECE],
                                        self.timeout):
                return          # lost: reply() knows what is left of it

    def reply(self):
        """The next Reply."""
        reply = self.connection.reply(self.timeout)
        shown = self.redactor.auth_reply(reply) if self.sent == AUTH \
            else reply
        self.show(Trace.RECEIVED, shown.text)
        return reply

    def quit(self, before=b''):
        """Says QUIT, with what ends the present step before it.  Its reply
        is not waited for."""
        if self.sent < DONE:
            self.show(Trace.SENT, before + QUIT)
            self.connection.send_best_effort(before + QUIT)
        self.advance(sent=DONE)

    def show(self, mark, text):
        """A part of the dialogue for the trace, without secrets."""
        if self.trace.fd is not None:
            self.trace.write(mark, self.redactor.hide(
                text.replace(b'\r', b''), mark == Trace.RECEIVED))


class TlsSetup(Record):
    """How a session is to use TLS.  policy: a TlsPolicy; make_context: the
    policy to an SSLContext; cache: a TlsCache that keeps what can be
    resumed, or None; failure: why TLS failed on the connection before this
    one to the same address, or empty."""
    __slots__ = ('policy', 'make_context', 'cache', 'failure')


class AuthFailed(Exception):
    """An AUTH exchange that did not end well.  report: the message report;
    reply: the server's; unknown_method: it may know another one; before:
    what has to be sent to end the exchange."""

    def __init__(self, report, reply, unknown_method=False, before=b''):
        Exception.__init__(self, report)
        self.report, self.reply = report, reply
        self.unknown_method, self.before = unknown_method, before


class Session:
    """From the greeting to the point where MAIL may be said.

    open() returns None when it may, else the Result.  route is a Route,
    tls a TlsSetup, helohost the name to greet with (bytes)."""

    def __init__(self, dialogue, server, route, tls, helohost):
        self.dialogue, self.server, self.route = dialogue, server, route
        self.tls, self.helohost = tls, helohost
        self.offered = {}               # by EHLO
        self.encrypted = False
        self.unauthenticated = b''      # why no password was used, for reports
        self.tls_failure = tls.failure  # why this session is in the clear
        self.tls_summary = TLS_GAVE_UP % tls.failure if tls.failure else b''
        self.ticket = None              # the key of a TLS session to keep

    def open(self):
        """See above.  Raises ConnectionLost, ProtocolError, LocalFault, and
        TlsFailed if TLS did not come about."""
        if self.server.port == PORT_SMTPS and self.tls.policy.wanted:
            self.secure(self.make_context())
        return (self.greet() or self.say_hello(EHLO) or self.start_tls() or
                self.authenticate())

    def refused(self, report, reply, diagnostic):
        """The Result of a refusal: QUIT, and another server may do better."""
        self.dialogue.quit()
        redactor = self.dialogue.redactor
        return Result(
            report + reply_text(reply, redactor), try_next=True,
            answered=True, tls_summary=self.tls_summary,
            diagnostic=diagnostic + b': ' + reply_summary(reply, redactor))

    def greet(self):
        """The greeting (RFC 5321 3.1)."""
        reply = self.dialogue.reply()
        if reply.code != 220:
            return self.refused(GREETING_FAILED % self.server.address, reply,
                                b'greeting failed')
        return None

    def say_hello(self, step):
        """EHLO, or HELO for a server that does not know it (RFC 5321
        3.2)."""
        self.offered = {}
        reply = self.dialogue.command(step, b'EHLO ' + self.helohost)
        if reply.kind() == 2:
            self.offered = parse_ehlo(reply.text)
        elif reply.kind() == 5:
            reply = self.dialogue.command(step, b'HELO ' + self.helohost)
        if reply.kind() == 3:
            raise ProtocolError(b'out of step')
        if reply.kind() != 2:
            return self.refused(NAME_REJECTED % self.server.address, reply,
                                b'my name was rejected')
        self.dialogue.advance(replied=step)
        return None

    def start_tls(self):
        """STARTTLS (RFC 3207), if it is offered or required."""
        policy = self.tls.policy
        if self.encrypted or not policy.wanted:
            return None
        if b'STARTTLS' not in self.offered:
            if policy.required or (self.tls_failure and
                                   self.route.credentials):
                self.dialogue.quit()
                raise TlsFailed(b'the server does not offer STARTTLS')
            return None
        context = self.make_context()
        if context is None:
            return None
        try:
            reply = self.dialogue.command(TLS, b'STARTTLS')
        except ConnectionLost as lost:
            raise TlsFailed(b'no answer to STARTTLS: ' + lost.diagnostic)
        if reply.code != 220:
            self.dialogue.quit()
            raise TlsFailed(b'STARTTLS refused: ' + reply_summary(
                reply, self.dialogue.redactor))
        self.secure(context)
        try:
            return self.say_hello(TLS)
        except ConnectionLost as lost:
            # In TLS 1.3 the server judges our certificate only now.
            raise TlsFailed(lost.diagnostic)

    def make_context(self):
        """The SSLContext; None if this Python has no ssl module and nothing
        speaks against clear text.  Raises TlsFailed."""
        try:
            return self.tls.make_context(self.tls.policy)
        except ImportError:
            if self.tls.policy.required or self.route.credentials or \
                    self.server.port == PORT_SMTPS:
                self.dialogue.quit()
                raise TlsFailed(NO_SSL)
        self.tls_failure, self.tls_summary = NO_SSL, TLS_GAVE_UP % NO_SSL
        return None

    def secure(self, context):
        """The handshake, with the check of the certificate."""
        policy, name = self.tls.policy, self.server.name
        if policy.level in (TlsPolicy.DANE, TlsPolicy.ANCHORS):
            name = self.server.tlsa.host
        elif canonical(name) and (not policy.verified or
                                  policy.level == TlsPolicy.PINNED):
            name = None                     # RFC 6066 3: no address in SNI
        kept = None
        if self.tls.cache is not None and policy.may_resume:
            self.ticket = context, self.server.address, self.server.port, name
            kept = self.tls.cache.find_session(self.ticket)
        self.dialogue.connection.start_tls(
            context, name, min(self.dialogue.timeout, TLS_HANDSHAKE),
            self.verify_peer, kept)
        self.encrypted, self.tls_failure = True, b''

    def verify_peer(self, layer):
        """The check of the certificate, as far as OpenSSL leaves it to us,
        and its words for the report.  Raises TlsFailed."""
        policy, checked = self.tls.policy, b'verified'
        if not policy.verified:
            checked = b'certificate not checked'
        elif policy.level == TlsPolicy.DANE:
            dane_check(policy.trust, shown_chain(layer.ssl_object))
        elif policy.level in (TlsPolicy.FILE, TlsPolicy.PINNED):
            if layer.ssl_object.getpeercert(True) in \
                    pem_certificates(policy.trust):
                checked = b'pinned'
            elif policy.level == TlsPolicy.PINNED:
                raise TlsFailed(b'certificate not in tlshosts')
        elif policy.level == TlsPolicy.ANCHORS and not is_for(
                layer.ssl_object.getpeercert(),
                self.server.reference_names()):
            raise TlsFailed(b'the certificate is for other names')
        if policy.level in (TlsPolicy.DANE, TlsPolicy.ANCHORS):
            checked = b'DANE'
        self.tls_summary = layer.facts() + b', ' + checked + b'\n'
        self.dialogue.trace.write(Trace.NOTE, b'TLS: ' + self.tls_summary)

    def keep_ticket(self):
        """The TLS session can be resumed from now on: all went well."""
        if self.ticket is not None:
            layer = self.dialogue.connection.tls
            self.tls.cache.keep_session(self.ticket,
                                        layer.ssl_object.session)

    def drop_ticket(self, failed):
        """The TLS session is not to be resumed again; the TlsFailed then
        says whether it was."""
        if self.ticket is not None:
            known = self.tls.cache.drop_session(self.ticket)
            failed.resumed = known and not failed.certificate
        return failed

    # Authentication (RFC 4954)

    def authenticate(self):
        """A rejection is final: the next server would count another try as
        a guess at the password.  Only 504, which says that the method is
        not known, leads to the next method; 421 leads to the next server.
        """
        if self.route.credentials is None:
            if self.route.lacking:
                self.unauthenticated = AUTH_LACKING % self.route.lacking
            return None
        self.guard_password()
        offered, failed = self.offered.get(b'AUTH', ()), None
        for name, method in self.auth_methods():
            if name not in offered:
                continue
            try:
                method()
                self.dialogue.advance(replied=AUTH)
                return None
            except AuthFailed as failure:
                failed = failure
            if not failed.unknown_method:
                break
        if failed is None:
            self.unauthenticated = AUTH_MISSING
            return None
        return self.auth_refused(failed)

    def guard_password(self):
        """Rules 1 and 2 again, at the edge: choose_route() and choose_tls()
        have seen to both.  Raises LocalFault rather than send a password to
        a server that no route names, or without the TLS that it needs."""
        unchecked = not self.tls.policy.verified
        if self.route.relay is None or \
                (self.tls_failure and not self.encrypted) or \
                (must_verify(self.server) and
                 (unchecked or not self.encrypted)):
            raise LocalFault(NO_RESOURCES)

    def auth_methods(self):
        """Names and methods, best first.  Over TLS the plain ones: they do
        not need the server to keep the password in clear text."""
        plain = [(b'PLAIN', self.auth_plain), (b'LOGIN', self.auth_login)]
        cram = [(b'CRAM-MD5', self.auth_cram)] if has_md5() else []
        return plain + cram if self.encrypted else cram + plain

    def auth_refused(self, failed):
        """The Result of an AuthFailed."""
        reply = self.dialogue.redactor.auth_reply(failed.reply)
        self.dialogue.quit(failed.before)
        redactor = self.dialogue.redactor
        return Result(
            failed.report + reply_text(reply, redactor), answered=True,
            try_next=reply.code == 421, tls_summary=self.tls_summary,
            diagnostic=b'authentication failed: ' +
            reply_summary(reply, redactor))

    def auth_step(self, want, what, line):
        """One exchange; the Reply if its code is wanted.  Raises
        AuthFailed."""
        reply = self.dialogue.command(AUTH, line)
        if reply.code not in want:
            raise AuthFailed(
                AUTH_REJECTED % (self.server.address, what), reply,
                reply.code == 504 and what.startswith(b'AUTH '),
                CANCEL if reply.code == 334 else b'')
        return reply

    def encode(self, value, what, before=b''):
        """base64, known to the redactor.  Raises LocalFault if the line
        would be too long for any server, or memory runs out; before ends
        the exchange then."""
        try:
            encoded = base64(value)
        except MemoryError:
            encoded = None
        if encoded is None or len(encoded) > AUTH_LINE_MAX:
            self.dialogue.quit(before)
            raise LocalFault(AUTH_UNENCODABLE % (self.server.address, what))
        self.dialogue.redactor.add(encoded)
        return encoded

    def auth_plain(self):
        """RFC 4616, with an initial response; some servers want it again."""
        user, password = self.route.credentials
        secret = self.encode(b'\0' + user + b'\0' + password, b'(plain)')
        line, want = b'AUTH PLAIN ' + secret, {235, 334}
        if len(line) > AUTH_COMMAND_MAX:
            line, want = b'AUTH PLAIN', {334}
        try:
            reply = self.auth_step(want, b'AUTH PLAIN', line)
        except AuthFailed as failed:
            if failed.reply.code == 535 and 235 in want:
                failed.report = AUTH_REJECTED % (       # of the response
                    self.server.address, b'plain')
            raise
        if reply.code == 334:
            self.auth_step((235,), b'plain', secret)

    def auth_login(self):
        """draft-murchison-sasl-login."""
        user, password = self.route.credentials
        user = self.encode(user, b'user')
        password = self.encode(password, b'pass')
        self.auth_step((334,), b'AUTH LOGIN', b'AUTH LOGIN')
        self.auth_step((334,), b'username', user)
        self.auth_step((235,), b'password', password)

    def auth_cram(self):
        """RFC 2195."""
        user, password = self.route.credentials
        reply = self.auth_step((334,), b'AUTH CRAM-MD5', b'AUTH CRAM-MD5')
        challenge = reply.text.split(b'\n')[0][4:]
        try:
            if len(challenge) > AUTH_LINE_MAX:
                raise ValueError('too long')
            digest = hmac_md5(password, unbase64(challenge))
        except ValueError:
            raise AuthFailed(AUTH_UNDECODABLE % self.server.address, reply,
                             before=CANCEL)
        self.dialogue.redactor.add(digest)
        answer = self.encode(user + b' ' + digest, b'user', CANCEL)
        self.auth_step((235,), b'username+digest', answer)

    def facts(self):
        """What a Transaction has to know of this session."""
        return SessionFacts(
            self.server.address, self.offered, self.encrypted,
            self.unauthenticated, self.tls_failure, self.tls_summary)


class SessionFacts(Record):
    """Of an open session.  address: the server's; offered: by EHLO;
    unauthenticated: why no password was used (report text, or empty);
    tls_failure: why it is not encrypted, though it was tried, or empty;
    tls_summary: about TLS, for the report."""
    __slots__ = ('address', 'offered', 'encrypted', 'unauthenticated',
                 'tls_failure', 'tls_summary')


class Transaction:
    """One message on an open session: MAIL, RCPT, DATA, the message.

    Nothing can change the outcome once the reply to the end of the data has
    been read: neither the server, nor the connection, nor a fault here."""

    def __init__(self, dialogue, facts, envelope, message):
        self.dialogue, self.facts = dialogue, facts
        self.envelope, self.message = envelope, message
        self.recipients = []            # their reports
        self.rcpt_sent = False          # the server may know them
        self.wire_bytes = 0             # of the message, sent so far
        self.seam = b'\r\n'             # the last bytes of the last block
        self.tls_summary = facts.tls_summary
        self.outcome = None             # the Result, once it is certain

    def run(self):
        """The Result.  Raises ConnectionLost, ProtocolError, LocalFault."""
        if b'SMTPUTF8' not in self.facts.offered and self.needs_smtputf8():
            return self.no_smtputf8()
        replies = self.dialogue.exchange(self.commands(), self.pipelining())
        self.rcpt_sent = self.pipelining()
        reply = self.agreeable(next(replies))
        if reply.kind() != 2:
            return self.refused(SENDER_REJECTED, reply,
                                b'sender was rejected')
        self.dialogue.advance(replied=MAIL)
        self.rcpt_sent = True
        for address in self.envelope.recipients:
            reply = self.recipient_report(address, replies)
            if reply is not None and reply.code == 421:
                return self.result(DIED, reply)
        if b'r' not in self.recipients:
            return self.all_recipients_rejected(replies)
        self.dialogue.advance(replied=RCPT)
        reply = next(replies)
        if reply.code != 354:
            return self.refused(DATA_FAILED, reply)
        self.dialogue.advance(replied=DATA)
        return self.transfer()

    # The envelope

    def pipelining(self):
        """Whether commands may leave together (RFC 2920)."""
        return b'PIPELINING' in self.facts.offered

    def commands(self):
        """MAIL, RCPT and DATA, with their steps."""
        return [(MAIL, self.mail_command())] + [
            (RCPT, b'RCPT TO:<' + address + b'>')
            for address in self.envelope.recipients
            if self.sendable(address)] + [(DATA, b'DATA')]

    def mail_command(self):
        """MAIL with the parameters that the server and the message call for
        (RFC 1870, 6152, 6531)."""
        offered, line = self.facts.offered, b'MAIL FROM:<' + \
            self.envelope.sender + b'>'
        if b'SIZE' in offered or b'8BITMIME' in offered:
            size, eight_bit = self.message.scan()
            if size is not None and b'SIZE' in offered:
                line += b' SIZE=%d' % size
            if eight_bit and b'8BITMIME' in offered:
                line += b' BODY=8BITMIME'
        if b'SMTPUTF8' in offered and any(
                address and non_ascii(address) for address in
                [self.envelope.sender] + self.envelope.recipients):
            line += b' SMTPUTF8'
        return line

    def sendable(self, address):
        """Whether there will be a RCPT for this recipient."""
        return address is not None and (
            not non_ascii(address) or b'SMTPUTF8' in self.facts.offered)

    def needs_smtputf8(self):
        """Whether the sender or every recipient does (RFC 6531)."""
        return non_ascii(self.envelope.sender) or \
            not any(map(self.sendable, self.envelope.recipients))

    def no_smtputf8(self):
        """The Result where that is not offered: a refusal like another."""
        self.dialogue.quit()
        report = SENDER_8BIT if non_ascii(self.envelope.sender) \
            else RECIPIENTS_8BIT
        result = self.result(self.soften(report), None, b'no SMTPUTF8')
        result.answered = True
        return result

    def recipient_report(self, address, replies):
        """Adds the report for one recipient; returns the Reply, or None if
        there was no RCPT."""
        if not self.sendable(address):
            self.recipients.append(
                BAD_RECIPIENT if address is None else
                self.soften(RECIPIENT_8BIT) % self.facts.address)
            return None
        reply = self.agreeable(next(replies))
        if reply.kind() == 2:
            self.recipients.append(b'r')
            return reply
        report = self.soften(RECIPIENT_REJECTED, reply)
        if reply.code == 552 and b'r' in self.recipients:
            report = temporary(report)          # RFC 5321 4.5.3.1.10
        self.recipients.append(
            report % self.facts.address +
            reply_text(reply, self.dialogue.redactor))
        return reply

    def all_recipients_rejected(self, replies):
        """The Result if no recipient is left.  A server that opens the data
        phase all the same gets a lone dot, and no message (RFC 2920 3.1).
        """
        before = b''
        try:
            if self.pipelining() and next(replies).code == 354:
                before = END_OF_DATA
        except ConnectionLost:
            pass                # the recipients are decided already
        self.dialogue.quit(before)
        later = any(report.startswith(b's') for report in self.recipients)
        return self.result(temporary(GIVING_UP) if later else GIVING_UP)

    # The message

    def transfer(self):
        """The message and the final dot; the Result."""
        if self.facts.tls_failure:
            self.tls_summary = TLS_IN_THE_CLEAR % self.facts.tls_failure
        self.dialogue.trace.start_progress()
        held = b''              # so that the dot leaves with the last block
        for block in wire_form(self.message.blocks()):
            if not self.send_block(held):
                return self.premature_reply()
            self.guard_end_of_data(block)
            held = block
        if not self.send_block(held + END_OF_DATA, END):
            return self.premature_reply()
        self.dialogue.show(Trace.NOTE, b'message: %d bytes' %
                           (self.wire_bytes - len(END_OF_DATA)))
        self.dialogue.show(Trace.SENT, END_OF_DATA)
        return self.end_of_data_reply()

    def guard_end_of_data(self, block):
        """Rule 3 again, at the edge: wire_form() has seen to it.  Raises
        LocalFault rather than send an end of the data before its time, be
        it within a block or across two."""
        end = b'\r\n' + END_OF_DATA
        if (b'.' in block and end in block) or \
                end in self.seam + block[:len(end)]:
            raise LocalFault(NO_RESOURCES)
        self.seam = (self.seam + block[-len(end):])[-len(end):]

    def send_block(self, data, step=DATA):
        """Sends a part of the message.  False if the server does not wait
        for the end: it has replied, or the connection is lost."""
        connection, view = self.dialogue.connection, memoryview(data)
        for at in range(0, len(view), SEND_PIECE):
            piece = view[at:at + SEND_PIECE]
            if connection.input_pending() or not connection.send(
                    piece, self.dialogue.timeout, stop_on_input=True):
                return False
            self.wire_bytes += len(piece)
            if at + len(piece) == len(view):
                self.dialogue.advance(sent=step)        # rule 6: at once
            self.dialogue.trace.progress(self.wire_bytes,
                                         self.message.wire_size())
        return True

    def premature_reply(self):
        """The Result of a refusal in mid-message.  No QUIT: it would be a
        line of the message."""
        reply = self.dialogue.reply()
        if reply.kind() < 4:
            raise ProtocolError(b'spoke out of turn')
        return self.result(self.soften(MESSAGE_FAILED, reply), reply)

    def end_of_data_reply(self):
        """The reply to the end of the data decides.  Both Results are made
        before it is read: what fails afterwards finds the outcome set."""
        address = self.facts.address
        accepted = Result(
            b'K' + self.facts.unauthenticated + ACCEPTED % address,
            self.recipients, tls_summary=self.tls_summary)
        refused = Result(temporary(MESSAGE_FAILED) % address,
                         self.recipients, tls_summary=self.tls_summary)
        reply = self.dialogue.connection.reply(self.dialogue.timeout, True)
        if 300 <= reply.code < 400:
            raise ProtocolError(b'out of step')
        self.outcome = accepted if reply.code < 300 else refused
        if reply.code < 300:
            self.dialogue.advance(replied=END)
            accepted.report += reply_text(reply, self.dialogue.redactor)
        else:
            self.outcome = self.result(self.soften(MESSAGE_FAILED, reply),
                                       reply)
        self.dialogue.show(Trace.RECEIVED, reply.text)
        self.dialogue.quit()
        return self.outcome

    # Results

    def agreeable(self, reply):
        """The reply, if it is 2xx or a refusal.  Raises ProtocolError."""
        if reply.kind() == 3:
            raise ProtocolError(b'out of step')
        return reply

    def soften(self, report, reply=None):
        """The report of a refusal (reply None: by what EHLO does not offer).
        It is temporary if the reply is, and if our configuration may be the
        reason: a password that was not used, TLS that we lack (rule 8)."""
        facts = self.facts
        lacks_tls = not facts.encrypted and (
            facts.tls_failure or b'STARTTLS' in facts.offered)
        if (facts.unauthenticated or
                (reply is not None and not permanent(reply)) or
                (lacks_tls and (reply is None or about_security(reply)))):
            return temporary(report)
        return report

    def refused(self, report, reply, diagnostic=b''):
        """The Result of a refusal, after QUIT."""
        self.dialogue.quit()
        return self.result(self.soften(report, reply), reply, diagnostic)

    def result(self, report, reply=None, diagnostic=b''):
        """The Result of this transaction: a report with the server's
        address, its reply if there is one, and why no password was used.
        Until MAIL is accepted another server may do better."""
        report = report % self.facts.address
        if reply is not None:
            redactor = self.dialogue.redactor
            report += reply_text(reply, redactor)
            diagnostic += b': ' + reply_summary(reply, redactor)
        return Result(report + self.facts.unauthenticated, self.recipients,
                      try_next=not self.dialogue.committed,
                      answered=reply is not None, diagnostic=diagnostic,
                      tls_summary=self.tls_summary)


# ------------------------------------------------------------ 15. Delivery
# One message, from its arguments to its Result.  try_servers() decides
# between "next server" and "report", and nothing else does.

class Context(Record):
    """What a delivery needs from outside.  resolver: ask(); is_own: whether
    an address is this host's; tcpto: a TcpTo; connect: (address, port,
    seconds) to a socket; connection: a socket to a Connection; message: a
    Message; tls_control: a name to a TlsControl; tls_context: (TlsPolicy,
    TlsControl, tls12) to an SSLContext; tls_cache: a TlsCache, or
    None; trace: a Trace."""
    __slots__ = ('resolver', 'is_own', 'tcpto', 'connect', 'connection',
                 'message', 'tls_control', 'tls_context', 'tls_cache',
                 'trace')


def make_context(control, message, trace=NO_TRACE, cache=None, first=None):
    """The Context of a process.  If it is to make more than one delivery,
    cache is a TlsCache, and first is the NameServer to ask first."""
    try:
        resolv_conf = read_file(b'/etc/resolv.conf', CONTROL_MAX)
    except (OSError, Invalid):
        resolv_conf = None
    config = parse_resolv_conf(resolv_conf,
                               os.environ.get(b'DNSCACHEIP', b''))

    def connect_from(address, port, seconds):
        return connect(address, port, seconds,
                       control.outgoingip.get(family_of(address)))
    return Context(
        Resolver(config, wait, time.monotonic, trace, first),
        OwnAddresses(control.moreipme, control.notipme, is_local),
        TcpTo(b'queue/lock/tcpto', time.time, os.getpid(), wait),
        connect_from,
        Connection, message, read_tls_control,
        cache.context if cache else tls_context, cache, trace)


class Envelope(Record):
    """sender and recipients (bytes) as they go between < and >; None in the
    place of a recipient that must never be sent."""
    __slots__ = ('sender', 'recipients')
    sender: bytes
    recipients: list


def deliver(host, sender, recipients, control, context):
    """Delivers one message.  host, sender and recipients are bytes as they
    were given.  Returns the Result; raises LocalFault."""
    envelope = Envelope(
        envelope_address(sender),
        [envelope_address(address) or None for address in recipients])
    if envelope.sender is None:
        return Result(BAD_SENDER)
    if not any(envelope.recipients):
        return Result(NO_RECIPIENT, [BAD_RECIPIENT for _ in recipients])
    route = choose_route(host, sender, control)
    context.trace.write(Trace.NOTE,
                      route_summary(host, sender, route, control))
    def find(hurry=False):
        return find_servers(host, route, context.resolver, context.is_own,
                            hurry)
    found = find(hurry=True)
    if found.report:
        return Result(found.report)
    servers = found.servers
    if found.incomplete:
        servers = late_ones(servers, find)
    context.message.check()
    return try_servers(servers, lambda server: ServerTry(
        server, route, envelope, control, context).run(), context.trace)


def try_servers(servers, attempt, trace=NO_TRACE):
    """The Result of the first server that decides; attempt(server) gives
    one for each.  If none does, see best_refusal()."""
    attempts, log, rcpt_sent = [], b'', False
    for server in servers:
        result = attempt(server)
        rcpt_sent = rcpt_sent or result.rcpt_sent
        if not result.try_next:
            break
        attempts.append(result)
        line = server.address + b': ' + result.diagnostic
        log += line + b'\n'
        trace.write(Trace.NOTE, line)
    else:
        result = best_refusal(attempts)
        if len(attempts) < 2:
            log = b''
    result.rcpt_sent = rcpt_sent
    try:
        result.report += log
    except MemoryError:         # rule 7: the message may have been accepted
        pass
    return result


def best_refusal(attempts):
    """The Result if no server is left: the refusal of the most preferred
    server that answered.  It is permanent if every server that was reached
    refused the sender for good: the others would be waited for in vain
    (RFC 5321 4.2.1)."""
    refusals = [result for result in attempts if result.answered] + \
        [result for result in attempts if result.report]
    if not refusals:
        return Result(NO_CONNECTION)
    report = refusals[0].report
    if not all(result.report.startswith(b'D')
               for result in attempts if result.reached):
        report = temporary(report)
    return Result(report, tls_summary=refusals[0].tls_summary)


class ServerTry:
    """One address: a connection, and more only if TLS fails on it."""

    def __init__(self, server, route, envelope, control, context):
        self.server, self.route, self.envelope = server, route, envelope
        self.control, self.context = control, context
        self.tls_control = context.tls_control(server.name)

    def run(self):
        """The Result.  Raises LocalFault."""
        server, files = self.server, self.tls_control
        if self.route.relay is None and self.context.is_own(server.address):
            # Rule 5 again, at the edge.
            return Result(b'', try_next=True, reached=False,
                          diagnostic=b'an address of this host')
        if server.tlsa.status == Tlsa.UNKNOWN and files.pem is None and \
                not files.never:
            return Result(TLSA_TEMPORARY % server.name, try_next=True,
                          reached=False, diagnostic=b'TLSA lookup failed')
        policy = choose_tls(server, self.has_password(), files)
        if policy.level == TlsPolicy.CONFLICT:
            return Result(
                TLS_FORBIDDEN % (server.name, server.port), try_next=True,
                diagnostic=b'TLS forbidden by control/notlshosts')
        return self.connections(policy)

    def has_password(self):
        """Whether a password is for this server."""
        return self.route.credentials is not None

    def connections(self, policy):
        """The Result of the first connection on which TLS did not fail.
        There are two at most, three after a handshake that hung: the server
        may choke on a large hello, so that the next one is for TLS 1.2."""
        cache, address = self.context.tls_cache, self.server.address
        tls12 = cache is not None and cache.is_limited(address)
        result = self.connection(policy, tls12, None)
        failed = result.tls_failed
        if failed is not None and failed.silent and not tls12:
            tls12 = True
            result = self.connection(policy, tls12, failed)
        elif failed is not None and failed.resumed:
            # Without the session ticket, which is gone.
            return self.connection(policy, tls12, failed)
        failed = result.tls_failed
        last = None if failed is None else last_policy(
            policy, failed, self.server.port, self.has_password())
        if last is None:
            return result
        final = self.connection(last, tls12, failed)
        if final.tls_failed is not None and last.level == TlsPolicy.PINNED:
            return result       # it was only to see whether it is that one
        return final

    def connection(self, policy, tls12, before):
        """The Result of one connection.  tls12: with TLS 1.2 at most;
        before: the TlsFailed of the connection before this one, or None."""
        server, context = self.server, self.context
        context.trace.write(Trace.NOTE, b'server: %s, port %d (%s)' % (
            server.address, server.port, server.name))
        if context.tcpto.skip(server.address):
            return self.unreached(
                b'timed out before, not tried (qmail-tcpto)', before)
        try:
            sock = context.connect(server.address, server.port,
                                   self.control.timeoutconnect)
        except TimedOut:
            context.tcpto.timed_out(server.address)
            return self.unreached(b'connection timed out', before)
        except OSError as error:
            context.tcpto.answered(server.address)
            return self.unreached(error_text(error), before)
        context.tcpto.answered(server.address)
        connection = context.connection(sock)
        tls = TlsSetup(policy, lambda policy: context.tls_context(
            policy, self.tls_control, tls12), context.tls_cache,
            before.reason if before else b'')
        result = None
        try:
            result = self.converse(connection, tls)
        finally:
            try:
                connection.close()
            except BaseException:       # rule 7: the outcome stays
                if result is None:
                    raise
        return result

    def unreached(self, diagnostic, before):
        """The Result where there is no connection; but there was one if TLS
        failed on it before."""
        return Result(b'', try_next=True, reached=before is not None,
                      diagnostic=diagnostic)

    def converse(self, connection, tls):
        """The Result of one connection, from the greeting to QUIT.  The one
        place where ConnectionLost and TlsFailed become Results."""
        dialogue = Dialogue(
            connection, self.control.timeoutremote,
            Redactor(self.route.credentials), self.context.trace)
        session = Session(dialogue, self.server, self.route, tls,
                          self.control.helohost)
        transaction = None
        try:
            result = session.open()
            if result is None:
                transaction = Transaction(dialogue, session.facts(),
                                          self.envelope, self.context.message)
                result = transaction.run()
                result.rcpt_sent = transaction.rcpt_sent
                self.confirm(result, dialogue)
                session.keep_ticket()
            return result
        except BaseException as error:
            return self.broken_off(error, tls, dialogue, session, transaction)

    def confirm(self, result, dialogue):
        """Rule 7 again, at the edge: no K unless the server has agreed to
        the end of the data."""
        if result.report[:1] == b'K' and dialogue.replied < END:
            result.report = DIED_LATE % self.server.address

    def tls_result(self, failed, policy):
        """The Result of a TlsFailed, if nothing else is tried."""
        self.context.trace.write(Trace.NOTE, b'TLS failed: ' + failed.reason)
        if failed.silent and self.context.tls_cache is not None:
            self.context.tls_cache.limit_to_tls12(self.server.address)
        result = Result(
            TLS_FAILED % (self.server.address, failed.reason) + tls_hint(
                policy, failed, self.has_password(), self.server.name),
            try_next=True, diagnostic=b'TLS failed: ' + failed.reason)
        result.tls_failed = failed
        return result

    def broken_off(self, error, tls, dialogue, session, transaction):
        """The Result where an exception ended the session: TLS failed, the
        connection was lost, the peer out of step, or something failed here.
        Raises what was not foreseen, unless a message is in doubt."""
        if transaction is not None and transaction.outcome is not None:
            result = transaction.outcome        # rules 6 and 7
        elif dialogue.in_doubt:
            result = Result(DIED_LATE % self.server.address +
                            session.unauthenticated)
        elif isinstance(error, LocalFault):
            result = Result(error.report)
        elif isinstance(error, ConnectionLost):
            result = Result(DIED % self.server.address +
                            session.unauthenticated,
                            try_next=not dialogue.committed,
                            diagnostic=error.diagnostic)
        elif isinstance(error, TlsFailed):
            return self.tls_result(session.drop_ticket(error), tls.policy)
        else:
            raise error
        result.tls_summary = session.tls_summary
        if transaction is not None:
            result.recipients = transaction.recipients
            result.rcpt_sent = transaction.rcpt_sent
            result.tls_summary = transaction.tls_summary
        return result


def result_of(delivery):
    """The Result that delivery() returns.  If it raises, the Result that
    says so: a fault of this host defers the mail, whatever it is."""
    try:
        return delivery()
    except LocalFault as fault:
        return Result(fault.report)
    except MemoryError:
        return Result(NO_MEMORY)
    except BaseException:
        return Result(NO_RESOURCES)


# ----------------------------------------------------------------- 16. Spawner
# qmail-rspawn.  One process, the parent, reads commands from qmail-send and
# writes reports to it.  It forks workers, and the workers deliver.  The
# parent waits for qmail-send and for all workers at once, and for nothing
# else: it does no DNS, no SMTP and no TLS, and it opens no message.

class Command(Record):
    """One delivery that qmail-send asks for.  delnum: the delivery number
    (int).  messid: the name of the message in queue/mess; sender and
    recipient: the addresses (all bytes).  too_long: one of these three had
    more than SPAWN_FIELD_MAX bytes, and was cut there."""
    __slots__ = ('delnum', 'messid', 'sender', 'recipient', 'too_long')
    recipient: bytes

    def host(self):
        """What follows the last @ (qmail-rspawn.c, spawn())."""
        return self.recipient.rpartition(b'@')[2]


class CommandReader:
    """Reads Commands from the input, in pieces of any size (spawn.c,
    getcmd()).  A command is a byte, the delivery number, and three fields,
    each of which ends with a NUL: messid, sender, recipient."""

    def __init__(self):
        self.start_command()

    def start_command(self):
        """The next byte is a delivery number."""
        self.delnum = None
        self.fields = []        # those that are complete
        self.field, self.too_long = bytearray(), False

    def take(self, data):
        """Takes a piece of the input.  Returns the Commands that end in it."""
        commands, at = [], 0
        while at < len(data):
            at = self.take_part(data, at)
            if len(self.fields) == 3:
                messid, sender, recipient = self.fields
                commands.append(Command(self.delnum, messid, sender,
                                        recipient, self.too_long))
                self.start_command()
        return commands

    def take_part(self, data, at):
        """Takes a delivery number, or what there is of a field, from data at
        this index.  Returns the index of what follows."""
        if self.delnum is None:
            self.delnum = data[at]
            return at + 1
        nul = data.find(b'\0', at)
        end = len(data) if nul < 0 else nul
        room = SPAWN_FIELD_MAX - len(self.field)
        self.too_long = self.too_long or end - at > room
        self.field += data[at:min(end, at + room)]
        if nul >= 0:
            self.fields.append(bytes(self.field))
            self.field = bytearray()
        return end + 1


def refusal(command, limit, busy):
    """Why a command cannot be carried out, as the report for qmail-send;
    None if it can.  The order is that of spawn.c, docmd().  limit: how many
    deliveries there can be at once; busy: the delivery numbers in use."""
    if command.too_long:
        return SPAWN_TOO_LONG
    if command.delnum >= limit:
        return SPAWN_TOO_BIG
    if command.delnum in busy:
        return SPAWN_IN_USE
    # Only digits and slashes, not at the start: no path leads elsewhere.
    if command.messid.startswith(b'/') or \
            command.messid.translate(None, b'0123456789/'):
        return SPAWN_NONNUMERIC
    if len(command.messid) > SPAWN_MESSID_MAX:
        return SPAWN_MESSID_LONG
    if not command.messid:
        return SPAWN_MESSID_SHORT
    if b'@' not in command.recipient:
        return SPAWN_NO_HOST
    return None


def is_message_report(record):
    """Whether a record of qmail-remote's output is the message report."""
    return record[:1] in (b'K', b'Z', b'D')


def spawn_report(output):
    """What qmail-rspawn reports to qmail-send about one recipient, given the
    output of qmail-remote for him (qmail-rspawn.c, report())."""
    records = output.split(b'\0')[:-1]
    if not records:
        return SPAWN_SILENT
    outcome = next(filter(is_message_report, records), b'D')[:1]
    letter = {b's': b'Z', b'h': b'D'}.get(records[0][:1], outcome)
    text = letter + records[0][1:]
    # The message report explains the letter, unless it is the better news.
    is_better = b'DZK'.index(outcome) > b'DZK'.index(letter)
    if len(records) > 1 and is_message_report(records[1]) and not is_better:
        text += records[1][1:]
    return text


def verdicts(result, count):
    """What to report to qmail-send for each of count recipients that went in
    one delivery, in their order.  An empty text means: deliver once more to
    this recipient, alone.  Alone he may fare better, and there is no risk
    that he gets the message twice:

    recipient   what happened              verdict
    all         one recipient only, or     report: it holds for each of them
                no server knew of them
    accepted    the message was accepted,  report: he has got the message, or
                or is in doubt             may have
    accepted    the message was refused    alone: perhaps because of another
                or cannot have arrived     recipient
    refused,    he was the first           report: no other recipient was
    deferred                               known to the server
    deferred    none was accepted          report: the server takes nothing
                                           at this time
    refused,    he was not the first       alone: perhaps because of those
    deferred                               before him (their number, say)
    no reply    the connection was lost    alone: perhaps because of another
                before his turn            recipient"""
    texts = []
    for index in range(count):
        own = result.recipients[index:index + 1]
        text = spawn_report(output_of(Result(
            result.report, own, tls_summary=result.tls_summary)))
        is_final = count == 1 or not result.rcpt_sent or \
            is_final_among_several(result, index)
        texts.append(text if is_final else b'')
    return texts


def is_final_among_several(result, index):
    """Whether the recipient with this index, one of several that a server
    knew of, is not to be tried alone.  See the table in verdicts()."""
    if index >= len(result.recipients):
        return False
    letter = result.recipients[index][:1]
    if letter == b'r':
        return may_have_arrived(result)
    if index == 0:
        return letter in (b'h', b's')
    return letter == b's' and b'r' not in result.recipients


def may_have_arrived(result):
    """Whether the server has the message, or may have it."""
    return result.report.startswith(b'K') or \
        b'Possible duplicate!' in result.report.partition(b'\n')[0]


class WorkerFailed(Exception):
    """A worker has died, or what it sent makes no sense."""


def frame(parts):
    """What parent and worker send each other: the number of bytes that
    follow (32 bits), then the parts (bytes without NULs), with a NUL between
    them."""
    data = b'\0'.join(parts)
    return struct.pack('>L', len(data)) + data


def unframe(data, most):
    """The parts of a frame; [] as long as it is not complete.  Raises
    WorkerFailed for more than most bytes, or for more than one frame."""
    if len(data) < 4:
        return []
    size, = struct.unpack_from('>L', data)
    if size > most or len(data) > 4 + size:
        raise WorkerFailed('frame')
    return bytes(data[4:]).split(b'\0') if len(data) == 4 + size else []


def is_valid_answer(texts, batch):
    """Whether a worker may answer so: a report for each delivery of the
    batch, or, if there are several, an empty text, see verdicts()."""
    return len(texts) == len(batch) and all(
        is_message_report(text) or (not text and len(batch) > 1)
        for text in texts)


class WorkerConfig(Record):
    """What a worker is forked with.

    control     a Control; None if the control files cannot be used
    fault       the report of all deliveries then; otherwise empty
    tls_cache   a TlsCache; each worker goes on with a copy of its own
    signature   the control_signature() of the files that this was read from;
                None: read them again before the next delivery"""
    __slots__ = ('control', 'fault', 'tls_cache', 'signature')
    control: Control

    def batch_limit(self):
        """How many recipients go together.  There is nothing to wait for if
        all of them get one report."""
        return self.control.batch if self.control else 1


def unusable_config(fault):
    """The WorkerConfig with which each delivery gets this report.  It lasts
    for one dispatch: the cause may be no fault of the files."""
    return WorkerConfig(None, fault, TlsCache(), None)


def read_worker_config(store):
    """The WorkerConfig of the files as they are.  store: the paths of the
    trust store, see trust_store()."""
    signature, cache = control_signature(store), TlsCache()
    try:
        control = read_control()
        read_concurrency()      # used at the start only, but it must be valid
    except LocalFault as fault:
        return unusable_config(fault.report)
    try:
        files = read_tls_defaults()
        for level in TlsPolicy.IF_OFFERED, TlsPolicy.SYSTEM:
            cache.context(TlsPolicy(level, None), files)
    except (ImportError, LocalFault):
        pass                    # a delivery that needs a context reports it
    return WorkerConfig(control, b'', cache, signature)


def load_modules():
    """Loads each module that a delivery may need, by using it.  Later that
    could fail: the Python on the disk may have been replaced by another
    version than the one that runs."""
    for use in (lambda: base64(b''), lambda: hmac_md5(b'', b''),
                lambda: a_labels(b'\xc3\xa9'), lambda: 'x'.encode('idna'),
                lambda: b'\xc3'.decode('ascii', 'ignore'),
                lambda: dane_match((3, 0, 1, b''), b''), trust_store):
        try:
            use()
        except (ImportError, ValueError):
            pass                # no ssl, no MD5: the functions above cope


class JobRunner:
    """The deliveries of a worker.  owner: the user id that messages must
    belong to; config: a WorkerConfig; resolver: the Resolver of the last
    delivery, None before the first.  The name server that answered it is
    the first that the next delivery asks."""

    def __init__(self, owner, config):
        self.owner, self.config, self.resolver = owner, config, None

    def run(self, job):
        """Makes one delivery.  job: messid, sender, host, recipients (bytes),
        as Spawner.dispatch() sends them.  Returns the verdicts()."""
        messid, sender, host, *recipients = job
        result = result_of(
            lambda: self.deliver(messid, sender, host, recipients))
        try:
            return verdicts(result, len(recipients))
        except Exception:       # no memory: the outcome stays
            return verdicts(brief(result), len(recipients))

    def deliver(self, messid, sender, host, recipients):
        """The Result of one delivery.  Raises LocalFault."""
        control = self.config.control
        fd = open_message(messid, self.owner)
        try:
            if self.config.fault:
                raise LocalFault(self.config.fault)
            context = make_context(
                control, Message(fd, control.timeoutremote),
                cache=self.config.tls_cache,
                first=self.resolver.preferred() if self.resolver else None)
            self.resolver = context.resolver
            return deliver(host, sender, recipients, control, context)
        finally:
            try:
                os.close(fd)
            except OSError:
                pass            # the outcome stays


def work(sock, runner):
    """The life of a worker: takes jobs from the parent and answers each,
    until the parent closes its end of the socket pair."""
    while True:
        data, job = bytearray(), []
        while not job:
            wait((sock,), (), float('inf'))
            block = sock.recv(INPUT_BLOCK)
            if not block:
                return
            data += block
            job = unframe(data, SPAWN_JOB_MAX)
        sock.sendall(frame(runner.run(job)))


class Worker:
    """A worker as the parent sees it.  pid: its process id; sock: the
    parent's end of the socket pair; config: the WorkerConfig that it was
    forked with."""

    def __init__(self, pid, sock, config):
        self.pid, self.sock, self.config = pid, sock, config
        self.batch = []         # the Commands of its job; [] if it is idle
        self.unsent = b''       # what is left of the job to send
        self.answer = bytearray()   # what has come of the answer
        self.jobs = 0           # that it has had
        self.idle_since = 0     # on the clock of the WorkerPool

    def start_job(self, batch):
        """Gives a batch to a worker that is idle."""
        first = batch[0]
        self.batch, self.jobs = batch, self.jobs + 1
        self.unsent = frame([first.messid, first.sender, first.host()] +
                            [command.recipient for command in batch])
        self.send_job()

    def send_job(self):
        """Sends as much of the job as the socket takes at once."""
        try:
            while self.unsent:
                self.unsent = self.unsent[self.sock.send(self.unsent):]
        except BlockingIOError:
            pass
        except OSError:         # it is dead: receive() finds the same
            self.unsent = b''

    def receive(self):
        """Reads what there is of the answer.  Returns its texts, one for
        each Command of the batch; [] as long as it is not complete.  Raises
        WorkerFailed."""
        try:
            data = self.sock.recv(INPUT_BLOCK)
        except BlockingIOError:
            return []
        except OSError:
            data = b''
        if not data or not self.batch:
            raise WorkerFailed('dead, or an answer without a job')
        self.answer += data
        texts = unframe(self.answer, SPAWN_ANSWER_MAX)
        if texts and not is_valid_answer(texts, self.batch):
            raise WorkerFailed('answer')
        return texts

    def end_job(self, now):
        """Makes the worker idle.  now: the time on the clock."""
        self.batch, self.answer, self.idle_since = [], bytearray(), now

    def is_used_up(self, config):
        """Whether it must get no more jobs.  config: the WorkerConfig of new
        workers."""
        return self.jobs >= WORKER_GROUPS or self.config is not config


class WorkerPool:
    """All workers.  owner: the user id that messages must belong to."""

    def __init__(self, owner, clock):
        self.owner, self.clock = owner, clock
        self.store = trust_store()
        self.config = unusable_config(NO_RESOURCES)     # of new workers
        self.workers = {}       # {descriptor of its socket: Worker}
        self.idle = []          # Workers; the last one was the last to work
        self.unreaped = []      # process ids of workers that are to end
        self.next_fork = 0      # no fork before this time

    def reload_config(self):
        """Reads the WorkerConfig again if a file that it was read from has
        changed.  Idle workers with the old one end at once, others after
        their job."""
        if self.config.signature == control_signature(self.store):
            return
        try:
            self.config = read_worker_config(self.store)
        except Exception:       # no memory, no descriptor: a deferral
            self.config = unusable_config(NO_RESOURCES)
        while self.idle:
            self.close_worker(self.idle.pop())
        import gc
        gc.collect()
        getattr(gc, 'freeze', int)()    # workers share more of the memory

    def descriptors(self):
        """The descriptors of all workers, to wait for answers, and of those
        that have not got all of their job, to send the rest."""
        return list(self.workers), [fd for fd, worker in self.workers.items()
                                    if worker.unsent]

    def exchange(self, readable, writable):
        """Sends jobs and reads answers.  readable, writable: descriptors
        that are ready.  Returns [(Command, text)] of the answers; for the
        text see verdicts()."""
        answers = []
        for fd in writable:
            if fd in self.workers:
                self.workers[fd].send_job()
        for fd in readable:
            if fd in self.workers:
                answers += self.read_answer(self.workers[fd])
        return answers

    def read_answer(self, worker):
        """Reads what has come from a worker; if it has failed, kills it.
        Returns as exchange()."""
        batch = worker.batch
        try:
            texts = worker.receive()
        except WorkerFailed:
            self.kill_worker(worker)
            return [(command, SPAWN_CRASHED) for command in batch]
        if texts:
            worker.end_job(self.clock())
            if worker.is_used_up(self.config):
                self.close_worker(worker)
            else:
                self.idle.append(worker)
        return list(zip(batch, texts))

    def can_start_job(self):
        """Whether start_job() may be called at this moment.  A fork waits a
        little, because a worker that becomes idle is cheaper."""
        return bool(self.idle) or self.next_fork <= self.clock()

    def start_job(self, batch):
        """Gives a batch to an idle worker, or to a new one.  Raises
        LocalFault if there is none."""
        try:
            worker = self.idle.pop() if self.idle else self.fork_worker()
        except LocalFault:
            self.next_fork = self.clock() + (
                SPAWN_RETRY if self.has_jobs() else SPAWN_PACE)
            raise
        self.next_fork = self.clock() + SPAWN_PACE
        worker.start_job(batch)

    def has_jobs(self):
        """Whether a worker has a job."""
        return any(worker.batch for worker in self.workers.values())

    def fork_worker(self):
        """Returns a new Worker.  Raises LocalFault."""
        try:
            near, far = socket.socketpair()
        except OSError:
            raise LocalFault(SPAWN_NO_PIPE)
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            near.close()
            far.close()
            raise LocalFault(SPAWN_NO_FORK)
        if not pid:
            self.be_worker(near, far, parent)
        far.close()
        near.setblocking(False)
        worker = Worker(pid, near, self.config)
        self.workers[near.fileno()] = worker
        return worker

    def be_worker(self, near, far, parent):
        """What the new process does; does not return.  It closes whatever
        belongs to the parent or to another worker, and ends if the parent
        (a process id) is killed."""
        status = 1
        try:
            LAUNCHER.pid = parent
            near.close()
            for worker in self.workers.values():
                worker.sock.close()
            null = os.open(b'/dev/null', os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(null, 1)
            os.close(null)
            work(far, JobRunner(self.owner, self.config))
            status = 0
        finally:
            os._exit(status)

    def kill_worker(self, worker):
        """Ends a worker that has failed.  Its process id cannot be that of
        another process: it has not been reaped."""
        import _signal          # type: ignore  # mypy does not know it
        try:
            os.kill(worker.pid, _signal.SIGKILL)
        except OSError:
            pass
        if worker in self.idle:
            self.idle.remove(worker)
        self.close_worker(worker)

    def close_worker(self, worker):
        """Closes the socket to a worker; then the worker ends."""
        del self.workers[worker.sock.fileno()]
        worker.sock.close()
        self.unreaped.append(worker.pid)

    def close_idle(self):
        """Ends workers that have been idle for WORKER_IDLE, and reaps those
        that have ended."""
        now = self.clock()
        while self.idle and self.idle[0].idle_since + WORKER_IDLE <= now:
            self.close_worker(self.idle.pop(0))
        self.unreaped = [pid for pid in self.unreaped if not reaped(pid)]

    def deadline(self, has_work):
        """When close_idle() is due, or, if there is a batch to start,
        start_job()."""
        times = [self.clock() + 1] if self.unreaped else []
        if has_work:
            times.append(self.next_fork)
        if self.idle:
            times.append(self.idle[0].idle_since + WORKER_IDLE)
        return min(times, default=float('inf'))


def reaped(pid):
    """Whether this child has ended; then its process id is free."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except OSError:
        return True


class Batches:
    """Commands that wait for a worker.  Those for one message, sender and
    host are put into one batch, for one delivery."""

    def __init__(self, clock):
        self.clock = clock
        self.open = {}          # {key: (when it is due, [Command])}
        self.ready = []         # [[Command]]: they take no more Commands

    def add(self, command, limit):
        """Adds a Command to its batch.  limit: how many make it full.
        qmail-send goes through one message after the other, so that batches
        of other messages need not wait any longer.  Whether the address is
        ASCII decides what MAIL says, and whether a server without SMTPUTF8
        will do: it must not depend on other recipients."""
        for key in list(self.open):
            if key[0] != command.messid:
                self.close(key)
        key = command.messid, command.sender, command.host().lower(), \
            non_ascii(command.recipient)
        _, batch = self.open.setdefault(
            key, (self.clock() + SPAWN_GATHER, []))
        batch.append(command)
        if len(batch) >= limit:
            self.close(key)

    def add_alone(self, command):
        """Makes a ready batch of one Command."""
        self.ready.append([command])

    def take(self):
        """Removes and returns the ready batch that has waited longest."""
        return self.ready.pop(0)

    def put_back(self, batch):
        """Undoes take()."""
        self.ready.insert(0, batch)

    def close(self, key):
        """Makes an open batch a ready one."""
        _, batch = self.open.pop(key)
        self.ready.append(batch)

    def close_due(self):
        """Closes the batches that are due."""
        now = self.clock()
        for key, (due, _) in list(self.open.items()):
            if due <= now:
                self.close(key)

    def deadline(self):
        """When close_due() is due."""
        return min((due for due, _ in self.open.values()),
                   default=float('inf'))


class ReportWriter:
    """What qmail-send is to read from descriptor 1, which does not block.
    limit: the number of deliveries at once, which is announced first
    (spawn.c, main())."""

    def __init__(self, limit):
        self.output = bytearray((limit,))       # that is to be written

    def add(self, delnum, text):
        """Adds the report about a delivery number."""
        self.output += bytes((delnum,)) + text + b'\0'

    def is_empty(self):
        """Whether qmail-send has read everything."""
        return not self.output

    def is_full(self):
        """Whether no more commands are to be read before reports have been
        written: they would bring new reports."""
        return len(self.output) >= SPAWN_BACKLOG

    def write(self):
        """Writes as much as qmail-send takes at once; drops everything if it
        is gone."""
        try:
            while self.output:
                self.output = write_some(self.output)
        except BlockingIOError:
            pass
        except OSError:
            self.output = bytearray()


class Spawner:
    """The parent.  limit: how many deliveries there can be at once; owner:
    the user id that messages must belong to.  It waits in turn() only.  Its
    memory is bounded by SPAWN_BACKLOG and a report for each delivery."""

    def __init__(self, limit, owner, wait=wait, clock=time.monotonic):
        self.limit, self.wait = limit, wait
        self.reader, self.ended = CommandReader(), False
        self.busy = set()       # delivery numbers in use
        self.batches, self.pool = Batches(clock), WorkerPool(owner, clock)
        self.reports = ReportWriter(limit)

    def run(self):
        """Runs until the input has ended, and every delivery is reported."""
        self.pool.reload_config()
        while not self.ended or self.busy or not self.reports.is_empty():
            self.turn()

    def turn(self):
        """Waits until there is something to do, and does it."""
        reading, writing = self.pool.descriptors()
        if not self.ended and not self.reports.is_full():
            reading.append(0)
        if not self.reports.is_empty():
            writing.append(1)
        try:
            readable, writable = self.wait(reading, writing, self.deadline())
        except TimedOut:
            readable, writable = (), ()
        except LocalFault:      # sh has been killed: no more commands
            LAUNCHER.pid = None
            self.ended, readable, writable = True, (), ()
        for command, text in self.pool.exchange(readable, writable):
            self.take_answer(command, text)
        if 0 in readable:
            self.read_commands()
        self.batches.close_due()
        if self.batches.ready:
            self.dispatch()
        self.pool.close_idle()
        self.reports.write()

    def deadline(self):
        """When there is something to do though nothing is ready."""
        return min(self.batches.deadline(),
                   self.pool.deadline(has_work=bool(self.batches.ready)))

    def read_commands(self):
        """Reads commands from descriptor 0, and notices its end."""
        try:
            data = os.read(0, INPUT_BLOCK)
        except BlockingIOError:
            return
        except OSError:
            data = b''
        self.ended = not data
        for command in self.reader.take(data):
            text = refusal(command, self.limit, self.busy)
            if text is None:
                self.busy.add(command.delnum)
                self.batches.add(command, self.pool.config.batch_limit())
            else:
                self.reports.add(command.delnum, text)

    def dispatch(self):
        """Gives ready batches to workers.  If none can be had, they wait for
        the workers that have jobs; if there are no such workers, they are
        deferred."""
        self.pool.reload_config()
        while self.batches.ready and self.pool.can_start_job():
            batch = self.batches.take()
            try:
                self.pool.start_job(batch)
            except LocalFault as fault:
                if self.pool.has_jobs():
                    self.batches.put_back(batch)
                    return
                for command in batch:
                    self.finish(command, fault.report)

    def take_answer(self, command, text):
        """Takes the text of a worker about a Command, see verdicts()."""
        if text:
            self.finish(command, text)
        else:
            self.batches.add_alone(command)

    def finish(self, command, text):
        """Ends a delivery with its report."""
        self.busy.discard(command.delnum)
        self.reports.add(command.delnum, text)


# -------------------------------------------------------------------- 17. Main
# The process: its descriptors, its arguments, its end.

def fill_descriptors():
    """Opens /dev/null as each of the descriptors 0, 1, 2 that is closed: a
    report to descriptor 1 must not reach a server.  Descriptor 2 is
    /dev/null, too, if it is no terminal: qmail-rspawn reads as a report what
    comes from it.  Returns the list of those that were closed."""
    closed = []
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            closed.append(fd)
            os.open(b'/dev/null', os.O_RDWR)    # takes the lowest free one
    if not os.isatty(2):
        null = os.open(b'/dev/null', os.O_RDWR)
        os.dup2(null, 2)
        os.close(null)
    return closed


def argument_bytes(argument):
    """An argument (str) as the bytes that it was given as."""
    return argument.encode(sys.getfilesystemencoding(), 'surrogateescape')


def enter_home():
    """Changes to the qmail home.  Raises LocalFault."""
    try:
        os.chdir(os.environ.get(b'QMAILHOME') or QMAIL_HOME)
    except OSError:
        raise LocalFault(NO_HOME)


def run(argv):
    """A whole run of qmail-remote.  argv: its arguments (str), the name of
    the program first.  Returns the Result.  Raises LocalFault."""
    closed = fill_descriptors()
    arguments = [argument_bytes(argument) for argument in argv[1:]]
    if len(arguments) < 3:
        raise LocalFault(USAGE)
    enter_home()
    control, trace = read_control(), NO_TRACE
    if os.isatty(2):
        trace = Trace(2, wait)
        trace.use_colours()
    message = Message(None if 0 in closed else 0, control.timeoutremote)
    return deliver(arguments[0], arguments[1], arguments[2:], control,
                   make_context(control, message, trace))


def spawn():
    """A whole run of qmail-rspawn.  Raises OSError and LocalFault if it
    cannot start."""
    import _signal              # the C half of signal, as with os
    # Ignored, it would make the system reap workers: see kill_worker().
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
    fill_descriptors()
    enter_home()
    owner = os.stat(b'queue/mess/.').st_uid
    os.set_blocking(1, False)
    load_modules()
    TcpTo(b'queue/lock/tcpto', time.time, 0, wait).clear()
    try:
        limit = read_concurrency()
    except LocalFault:          # read_worker_config() defers all until then
        limit = SPAWN_LIMIT
    Spawner(limit, owner).run()


def send_mail():
    """A whole run of qmail-remote, with its output."""
    result = result_of(lambda: run(sys.argv))
    try:
        output = output_of(result)
    except BaseException:       # no memory: the outcome stays
        output = output_of(brief(result))
    write_output(output)


def main():
    """The whole process; does not return.  The exit status is 0, or, if an
    exception gets as far as here, 111: qmail-rspawn defers the mail then, and
    qmail-send notices that its qmail-rspawn has failed.  For any other
    status qmail-rspawn would bounce the mail."""
    status = 111
    try:
        if sys.argv[0].rpartition('/')[2] == 'qmail-rspawn':
            spawn()
        else:
            send_mail()
        status = 0
    finally:
        os._exit(status)


# -------------------------------------------------------------- 18. Manual
# make qmail-remote.8 makes the manual page of what stands between the two
# lines of quotes.  Python drops a string that nothing uses; and the last two
# lines of the file run it, so that a file that was cut short does nothing.

r"""
NAME
    qmail-remote - send mail via SMTP

SYNOPSIS
    qmail-remote host sender recip [recip ...]
    qmail-rspawn

DESCRIPTION
    qmail-remote reads a mail message from its input and sends the message
    to one or more recipients at a remote host.  qmail-rspawn runs it for
    each remote delivery; if $QMAILREMOTE is set, qmail-rspawn (notqmail
    1.08 and later) runs the program named there instead.

    host is a domain name, or an IP address: 1.2.3.4, [1.2.3.4],
    [2001:db8::1] or [IPv6:2001:db8::1].  The message goes to the mail
    exchangers that the Domain Name System lists for host, best preference
    first, or to host itself if there are none.  IPv4 comes before IPv6, for
    many servers refuse IPv6 from hosts without reverse DNS.  smtproutes and
    authsenders can name a relay instead.

    Until one server has accepted the sender, each failure there (no
    connection, a refusal with 4xx or 5xx, a lost connection) leads to the
    next server.  From then on the reply of that server is final.  A rejected
    password is final, too: a second try could lock the account.  If no
    server is left, the message bounces if each server that could be reached
    refused the sender with 5xx; otherwise it is tried again later.  A server
    without SMTPUTF8 counts as such a refusal, if the sender or all
    recipients need SMTPUTF8.  If only some recipients need it, the message
    goes to the others.

    With PIPELINING the whole envelope is sent at once.  SIZE, 8BITMIME and
    SMTPUTF8 are used where they are offered.

    If descriptor 2 is a terminal, qmail-remote shows its work there.  Lines
    with --- are about the route, DNS, the server, TLS and the progress of a
    long message; >>> is sent, <<< is received.  Passwords are left out.
    Bytes that a terminal could obey appear as \x and two digits.

    There are no options; getopt(3) is not followed.

TRANSPARENCY
    Each LF of the message becomes CR LF, a dot at the beginning of a line
    is doubled.  CR LF in the message stays one line end, and a CR alone
    ends a line too, so that no part of a message can be taken for the end
    of it.  All other bytes go out as they are, NULs, 8-bit bytes and long
    lines included.  A message that does not end with a newline cannot be
    sent.

    The domain of an address is sent as it is, never rewritten; a local
    part that needs it is quoted.  An address with CR, LF or NUL, or with a
    space, a control byte, < or > outside its local part, is refused and
    never sent.

TLS
    TLS is used where the server offers STARTTLS.  Where the certificate is
    not checked, TLS 1.0 and weak ciphers are accepted, for they are better
    than clear text.  If STARTTLS or the handshake fails there, the message
    goes to the same address in the clear, on a second connection.  On port
    465 TLS begins with the first byte, and nothing is sent without it.

    TLS is required, and the certificate is checked, in three cases:
    control/tlshosts has a file for the server; authentic TLSA records exist
    for the exchanger, or for a relay given by name (DANE, RFC 7672); or a
    password is for the server and its port is not 25 or 26.  This host
    itself (127.0.0.0/8, ::1) may get a password in the clear on any port.  A
    file in tlshosts decides before TLSA records do, and these before the
    system's trust store.  In all three cases at least TLS 1.2 is used, with
    OpenSSL's security level 1, or higher if the system asks for that.

    A handshake may take 60 seconds, or timeoutremote if that is less.  If it
    takes longer, or the connection is lost before the server has answered,
    the next connection offers TLS 1.2 at most, with the same checks: some
    servers hang when more is offered.  A server whose certificate fails
    against tlshosts gets a second connection, to see whether it shows the
    very certificate that is in the file.

    After a failure of TLS no password is sent in the clear.  A refusal with
    a code X.7.x then is temporary, for it may be TLS that the server misses.
    The same holds if notlshosts, or a Python without the ssl module, was the
    reason not to use TLS.

    On ports 25 and 26 a password goes over TLS if that is offered, with the
    certificate unchecked.  An attacker between the two hosts can then take
    TLS away, or show another certificate, and get the password.

    DANE takes name servers whose word about DNSSEC can be believed: all of
    them are 127.0.0.1, ::1 or 127.0.0.53, or resolv.conf(5) has "options
    trust-ad".  127.0.0.11 of Docker only forwards and is not believed.  TLSA
    records with usage 2 and 3 count.  With usage 2 the certificate may be
    for the exchanger or for the domain of the recipient.  Usage 2 with a
    digest takes CPython 3.10 or later; before, such records are unusable.
    Where all records are unusable TLS is required, and nothing is checked.
    If TLSA records cannot be looked up, the server is passed over.

RESULTS
    qmail-remote prints one report for each recipient, in the order of the
    arguments (fewer if the delivery fails), then one report for the
    message; each ends with a NUL.  The first letter tells the outcome.

    r   recipient report: accepted
    h   recipient report: permanently refused
    s   recipient report: temporarily refused
    K   message report: the server has taken responsibility for the message
        and every accepted recipient
    Z   message report: temporary failure
    D   message report: permanent failure

    A description for a human reader follows.  When several servers were
    tried, there is one line for each that failed.  User names and passwords
    are removed from the texts of servers.  From a reply to AUTH each line
    with a part of a password is left out.  The last line about a message
    that went over TLS names the protocol, the cipher, and what is known of
    the certificate: "certificate not checked", "verified" (by a CA),
    "pinned" (this very certificate is in tlshosts) or "DANE".  If TLS failed
    and the message went in the clear, the line is "TLS failed: WHY, sent in
    the clear".

    The exit status is 0, whatever the outcome.  It is 111 if Python cannot
    be started; qmail-rspawn takes that for a temporary failure, and any
    other status for a bounce.  Python needs 20 descriptors and up to 64 MB
    of memory, sh 12 descriptors and 5 MB.  Where sh itself cannot start, or
    where the file is cut off in its first lines, the message bounces.

SPAWNER
    Run under the name qmail-rspawn, the program takes the place of
    qmail-rspawn.  It reads the commands of qmail-send, and makes the
    deliveries itself, in processes that stay alive.  No other program is
    run, and $QMAILREMOTE is not used.  qmail-start looks for qmail-rspawn in
    PATH: a link of that name, in the first directory there, is enough.

    Recipients of one message with equal senders and equal hosts, whose
    commands come within 5 milliseconds, go together, up to 50.  Each has a
    report of his own.  A recipient that did not get the message in company,
    but might get it alone, is tried once more, alone: no recipient bounces
    because of others.

    A process makes up to 200 deliveries.  It ends after a minute without
    work, and when a control file, resolv.conf(5) or the system's trust store
    has changed.  Nothing is kept from one message to the next, except TLS
    sessions that can be resumed, which name server answered, and which
    servers get TLS 1.2 at most because they hung.  If a process is killed,
    its deliveries are deferred.

    At the end of its input, or within seconds after the sh that started it
    is killed, qmail-rspawn takes no more commands, finishes what has begun,
    and exits 0.  If it cannot start it exits 111.  If no process can be
    made, deliveries wait for the processes that exist.

TIMES
    A delivery takes at most, in seconds,

        D + S * (C + H * R + T) + (N + P + 2) * R

    D is for DNS: stages * attempts * name servers * timeout.  There are two
    stages, MX and the rest; one if a relay is named; none if an IP address
    is given; one more if an exchanger or relay is an alias and DANE is used.
    The addresses of up to 128 exchangers are one stage, for their questions
    run at once.  attempts (default 2) and timeout (default 5) are options of
    resolv.conf(5); up to 3 name servers are used.  After 2 seconds the
    addresses of the best exchangers are enough, if all of them are known.
    If these then fail, all is asked again: at worst this doubles D.

    S is the number of connections: at most 20 addresses, each twice if TLS
    fails at the end, three times if a handshake hung.  An address that is in
    tcpto with two time-outs takes no time.

    C is timeoutconnect (default 60), R is timeoutremote (default 1200), T is
    for the TLS handshake: 60, or R if that is less.

    H is the number of replies until MAIL is accepted: 4 (greeting, EHLO,
    HELO, MAIL).  With TLS there are 2 more, STARTTLS and EHLO.  With a
    password there are up to 5 more (CRAM-MD5 and PLAIN unknown, then 3 for
    LOGIN), and HELO drops out.

    N is the number of recipients, one reply each.  Under qmail it is 1; up
    to 50 if the program is qmail-rspawn, which may take the time for 1 in
    addition.

    P is the number of parts of the message: one for each 64 KiB that is
    sent, and one for each 256 KiB that is read.  The last 2 are the replies
    to DATA and to the message.

    For one recipient, 30 KB, one name server, without TLS:

                                        defaults   timeoutremote 600
        20 servers do not connect         1220 s              1220 s
        1 server delays all it can        9680 s              4880 s
        20 such servers                 102020 s             51620 s

    The first line is 20 + 20 * 60.  It happens, and tcpto makes it shorter
    next time.  The last one is 20 + 20 * (60 + 4 * 1200) + 4 * 1200.

    To shorten it, set timeoutremote to 600.  RFC 5321 (4.5.3.2) asks for no
    more than that; with less, a slow server may accept a message that is
    then sent again.  Next set timeoutconnect to 20 or 30, and "options
    timeout:2" in resolv.conf(5).

    The formula leaves out what takes ill will: a server that reads nothing
    can let a command wait up to R before it is sent, which doubles H, N and
    the reply to DATA.  It leaves out a slow reader of the reports, a
    message that comes by a slow pipe, up to 1 second for the lock of tcpto,
    and the processor.

    To end a delivery now, kill its sh, whose child is Python.  Python
    notices within 5 seconds while it waits for the network.  The message is
    deferred; if it was on its way, it may arrive twice.  If the program is
    qmail-rspawn, kill the process that has the connection, a child of its
    first Python.

REPORTS
    IP is the server's address, HOST a name, WHAT a step of AUTH.  Where a
    reply has a part in it, "Remote host said: " and the reply follow.

    Permanent (D; h for one recipient):

        I (qmail-remote) was invoked improperly. (#5.3.5)
        Sorry, I couldn't find any host named HOST. (#5.1.2)
        Sorry, I couldn't find a mail exchanger or IP address. (#5.4.4)
        Sorry, HOST does not accept mail. (#5.1.10)
        Sorry. Although I'm listed as a best-preference MX or A for that host,
            it isn't in my control/locals file, so I don't treat it as local.
            (#5.4.6)
        SMTP cannot transfer messages with partial final lines. (#5.6.2)
        Sorry, that sender address cannot be sent over SMTP. (#5.1.7)
        Sorry, that address cannot be sent over SMTP. (#5.1.3)
        Giving up: no address is left to send to. (#5.1.3)
        IP does not take non-ASCII addresses, such as the sender's. (#5.6.7)
        IP does not take non-ASCII addresses. (#5.6.7)

    Temporary (s), because the message goes to other recipients of it:

        IP does not take non-ASCII addresses. (#4.6.7)

    Permanent or temporary as the server's reply is (5xx: D, h; 4xx: Z, s):

        Connected to IP but sender was rejected.
        IP does not like recipient.
        Giving up on IP.
        IP failed on DATA command.
        IP failed after I sent the message.

    Temporary (Z), because of this host, its control files or its network:

        Unable to switch to home directory. (#4.3.0)
        Unable to read control files. (#4.3.0)
        I cannot send from ADDRESS, which is in control/outgoingip: WHY.
            (#4.3.0)
        Out of memory. (#4.3.0)
        System resources temporarily unavailable. (#4.3.0)
        I was told to stop. (#4.3.0)
        Unable to read message. (#4.3.0)
        Sorry, I couldn't find any host by that name. (#4.1.2)
        Sorry, I couldn't find the relay HOST. (#4.4.4)
        Sorry, I couldn't look up the TLSA records of HOST. (#4.4.3)

    Temporary, because of the servers:

        Sorry, I wasn't able to establish an SMTP connection. (#4.4.1)
        Connected to IP but greeting failed.
        Connected to IP but my name was rejected.
        Connected to IP but connection died. (#4.4.2)
        Connected to IP but connection died. Possible duplicate! (#4.4.2)
        Connected to IP but authentication was rejected (WHAT).
        Connected to IP but unable to base64decode challenge.
        Connected to IP but unable to base64encode WHAT.
        Connected to IP but TLS failed: WHY. (#4.7.5)
        No password is sent without TLS, but control/notlshosts/HOST
            forbids TLS on port PORT. (#4.7.5)

    After a failure of TLS one of these may follow:

        No password is sent in the clear after TLS has failed.
        No password is sent to this port without TLS and a certificate that
            can be verified.
        To trust this relay, put its certificate, or its CA's, into
            control/tlshosts/HOST.pem.
        Only the certificates in control/tlshosts/HOST.pem are trusted for
            this server.

    Success (K):

        IP accepted message.

    If a password for the relay was configured and could not be used, one of
    these comes first (K), or in addition.  Whatever the relay refuses then
    is temporary:

        no supported AUTH method found, continuing without authentication.
        the line of this route in the control files has no WHAT, continuing
            without authentication.

    From qmail-rspawn itself:

        qmail-spawn out of memory. (#4.3.0)
        qmail-spawn unable to open message. (#4.3.0)
        qmail-spawn unable to fstat message. (#4.3.0)
        qmail-spawn unable to create pipe. (#4.3.0)
        qmail-spawn unable to fork. (#4.3.0)
        qmail-remote crashed.
        qmail-remote produced no output.
        Sorry, message has wrong type. (#4.3.5)
        Sorry, message has wrong owner. (#4.3.5)
        Sorry, address must include host name. (#5.1.3)
        Internal error: delnum too big. (#4.3.5)
        Internal error: delnum in use. (#4.3.5)
        Internal error: messid has nonnumerics. (#5.3.5)
        Internal error: messid too long. (#5.3.5)
        Internal error: messid too short. (#5.3.5)

CONTROL FILES
    All of them are in the directory control of the qmail home, and each
    delivery reads them.  A file may be absent.  A file that cannot be read,
    is longer than 1 MiB or holds nonsense defers all mail until it is
    mended, and so does a symbolic link that leads nowhere.  Nonsense is, for
    example, a port over 65535, a relay that is no host name, or a moreipme
    line that is no address; in smtproutes and authsenders a blank at the
    beginning of a line or before its colon; in all files a byte order mark.

    All files belong to root, group qmail.  smtproutes with passwords,
    authsenders and clientcert.pem have mode 0640, the others 0644.  The
    user qmailr has to be able to read them.

    helohost
        Name to greet with.  Default: me, if that is supplied; otherwise
        qmail-remote refuses to run.

    smtproutes
        Artificial routes, one a line: domain:relay, domain:relay:port or
        domain:relay:port|user|password.  If domain is host, the message
        goes to relay, by the addresses of relay, without a look at its
        mail exchangers.  relay may be a name, 1.2.3.4, [1.2.3.4] or
        [2001:db8::1].  A domain that starts with a dot stands for all
        names that end with it, an empty one for every host.  An empty
        relay means: mail exchangers as usual (on port, if one is given).
        Names are compared as DNS does it: the case, a final dot, UTF-8 or
        Punycode do not matter.

            inside.af.mil:firewall.af.mil:26
            .af.mil:
            :heaven.af.mil

        The longest match counts: here inside.af.mil has its own relay, all
        other names that end with .af.mil use their mail exchangers, and
        everything else goes to heaven.af.mil.

        The name of a relay is looked up in DNS, never in /etc/hosts.  A
        relay that DNS does not know defers the message.

    authsenders
        Relays and passwords by envelope sender, stronger than smtproutes:
        sender:relay|user|password, sender:relay:port|user|password.  The
        sender is tried as a whole, then each part of it that starts with
        an @ or a dot, then the empty name, which matches every sender.  A
        colon within brackets is a part of it: a@[IPv6:2001:db8::1]:relay.

            @example.com|generic|passwd
            .subdomain.example.com|other|otherpw
            mail@example.com|test|testpass
            info@example.com:smtp.example.com:26|other|otherpw
            :mailrelay.example.com|e=mc2|testpass

        The password is the rest of the line, | and : included.  Without a
        relay (the first three lines) the route is that of smtproutes, and
        the password goes to a relay named there.  A server that only the
        Domain Name System named never gets a password; mail goes to it
        without.  A line with a relay but without any | is a route only;
        sender: alone means mail exchangers as usual.

        Methods are CRAM-MD5, PLAIN and LOGIN, over TLS CRAM-MD5 last.  Only
        504, which says that the server does not know a method, leads to the
        next one.  If the relay offers none of them, or the line lacks the
        user or the password, mail goes without, here and in smtproutes.
        What the relay refuses then does not bounce: it is tried again later.

    timeoutconnect
        Seconds to wait for a server to accept a connection.  Default: 60.

    timeoutremote
        Seconds to wait for each reply of a server, whole, and for each
        64 KiB of the message to leave.  Default: 1200.

    moreipme, notipme
        IP addresses, one a line, that are this host's besides those that
        it can find out itself, and that are not this host's after all.
        10.0.0.0/8 and 10.0.0.0/255.0.0.0 stand for whole networks.
        Mail is never sent to an exchanger that is this host, nor to one
        that is not preferred to it.

    outgoingip
        The address to connect from: one line with an IPv4 address, one with
        an IPv6 address, or both; each counts for connections of its kind.
        One that is no address, or not this host's, defers the mail, and the
        report names it.  Default: the kernel's choice.

    concurrencyspawn
        How many deliveries qmail-rspawn can run at once, at most 255; what
        conf-spawn is to the classic one, read when it starts.  Default: 120.
        concurrencyremote, of qmail-send, counts if it is less.  If it
        cannot be read then, it is 120 until the next start.

    batch
        How many recipients of a message qmail-rspawn puts into one delivery,
        at most 50; 0 or 1: each has his own.  Default: 50.

    tlshosts/NAME.pem
        Certificates, in PEM form.  NAME is the name of the exchanger, or of
        the relay as in the route: in lower case, without a final dot, as
        A-labels (xn--); for a relay that is given as an address, the address
        without brackets.  NAME gets mail only over TLS, and only with a
        certificate that is in this file, whatever its name and age, or with
        one for NAME, in date, from a CA in it.

    notlshosts/NAME
        If the file exists, no TLS with NAME.  The file may be empty.
        tlshosts is stronger than notlshosts.  Both are stronger than DANE.

    clientcert.pem
        A certificate and its key, to show to servers that ask for one.

    tlsclientciphers
        The ciphers to use up to TLS 1.2, a list for OpenSSL, see
        ciphers(1).  Ciphers without a certificate are never used, nor is
        security level 0 where a certificate is checked.

    ../queue/lock/tcpto
        Servers that recently timed out, shared with qmail-tcpto(8) and
        qmail-tcpok(8).

ENVIRONMENT
    QMAILHOME   the qmail home, instead of /var/qmail
    DNSCACHEIP  name servers, separated by blanks, instead of those in
                /etc/resolv.conf: 127.0.0.1, ::1, 127.0.0.1:5353 or
                [::1]:5353
    NO_COLOR    if set to anything: no colours on a terminal
    TERM        what colours the terminal has, see terminfo(5)
    SSL_CERT_FILE, SSL_CERT_DIR, OPENSSL_CONF
                are OpenSSL's: where the system's trusted certificates are,
                and its defaults

SECURITY
    Nothing that an address, a message, a control file or a reply holds can
    become a command.  No program is run.  Passwords are sent to relays that
    the administrator named, nowhere else.  A relay on port 25 or 26 that is
    not in tlshosts can be made to look as if it had no TLS, or another
    certificate; use another port or tlshosts for a password.

    Bytecode beside the file is used only if root alone can write it.

DIFFERENCES
    From qmail-remote of qmail 1.03 (netqmail and notqmail have changed some
    of this); what is not listed is meant to be equal.

    Servers.  EHLO is sent, and HELO only after a 5xx to EHLO.  IPv6 is used
    after IPv4.  STARTTLS, passwords, PIPELINING, SIZE, 8BITMIME and SMTPUTF8
    are supported.  The next server is tried after each failure before MAIL
    is accepted, not only if there was no connection: one broken exchanger
    stops no mail.  The report has a line for each server that failed.

    Messages.  A CR alone ends a line, CR LF is one line end, and a dot after
    either is doubled.  Some servers take CR for a line end; a message could
    otherwise hold its own end, and a forged message after it.  A partial
    final line is found before connecting, if the input is a file.

    Time.  timeoutremote is for each whole reply, and for each 64 KiB of the
    message, not for each read: no server can hold a delivery without end.

    DNS.  The program asks the name servers itself, with random identifiers
    and ports, and checks the answers strictly.  EDNS0 is used, and TCP if an
    answer is truncated; the addresses of all exchangers are asked for at
    once.  /etc/hosts and search lists are not used.  A null MX (RFC 7505)
    bounces the message.  A relay that DNS does not know defers it: an error
    in a control file bounces nothing.

    Replies.  A reply is three digits from 200 to 599, of one class on all
    its lines, and has 1 MiB at most; anything else counts as a lost
    connection.  In the reply to the message, lines without digits after the
    first one are passed over, for some servers write them.  530 is
    temporary, for it asks for a password or TLS.  552 to a recipient after
    others were accepted is temporary: it means too many recipients (RFC
    5321 4.5.3.1.10).  Only 354 opens the data phase.  A refusal in the
    middle of the message is read, and is the result.

    Addresses.  An address is this host's own if the kernel says that an
    interface has it; this works for IPv6, too.  The recipient's domain is
    not replaced by the target of a CNAME: RFC 5321 no longer asks for that,
    and it sends mail to names that the server does not know.  Bytes that
    could become commands are not sent.

    End.  QUIT is sent, and its reply is not waited for.  The exit status is
    0 or 111.

    From the SMTP AUTH patch: a line of authsenders without a relay counts.
    "no supported AUTH method found" is never a report by itself, before the
    outcome is known; qmail-rspawn took it for success.

    From qmail-rspawn of qmail 1.03: no program is run.  A recipient's report
    waits for those of the recipients that go with him.  When it is killed,
    deliveries under way stop within seconds and are deferred.  The number of
    deliveries at once is in a control file.

SEE ALSO
    qmail-control(5), qmail-send(8), qmail-rspawn(8), qmail-tcpok(8),
    qmail-tcpto(8), RFC 5321, RFC 4954, RFC 7505, RFC 7672, RFC 8314
"""

if __name__ == '__main__':
    main()
