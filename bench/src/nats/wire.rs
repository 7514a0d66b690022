//! The text protocol of NATS, as far as a client needs it, and the frames of its WebSocket.

/// One operation of a server.
#[derive(Debug, PartialEq, Eq)]
pub enum Op<'a> {
    /// What the server says of itself, JSON.
    Info(&'a [u8]),
    /// A message of a subscription.
    Message(Message<'a>),
    /// Wants a PONG.
    Ping,
    /// Answers a PING.
    Pong,
    /// Accepted, in verbose mode.
    Fine,
    /// Refused, with the reason.
    Refused(&'a [u8]),
}

/// One message; parts that it does not have are empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Message<'a> {
    /// Where it was published, or the inbox that it answers to.
    pub subject: &'a [u8],
    /// Where an answer is to go.
    pub reply: &'a [u8],
    /// Header block, from `NATS/1.0` to its empty line.
    pub headers: &'a [u8],
    /// Payload.
    pub payload: &'a [u8],
}

/// Longest line before a payload, in bytes; what is longer is no NATS.
const LINE_SIZE_MAX: usize = 64 << 10;

/// The first operation of `bytes` and its size, or `None` while it is not complete.
///
/// # Errors
/// Bytes that no server sends.
pub fn parse(bytes: &[u8]) -> Result<Option<(Op<'_>, usize)>, String> {
    let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else {
        return if bytes.len() > LINE_SIZE_MAX { Err(wrong(&bytes[..64])) } else { Ok(None) };
    };
    let (line, size) = (&bytes[..end], end + 1);
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let (verb, rest) = match line.iter().position(|byte| *byte == b' ') {
        Some(space) => (&line[..space], &line[space + 1..]),
        None => (line, &line[line.len()..]),
    };
    match verb {
        b"MSG" => message(line, rest, &bytes[size..], size, false),
        b"HMSG" => message(line, rest, &bytes[size..], size, true),
        b"PING" => Ok(Some((Op::Ping, size))),
        b"PONG" => Ok(Some((Op::Pong, size))),
        b"+OK" => Ok(Some((Op::Fine, size))),
        b"-ERR" => Ok(Some((Op::Refused(rest), size))),
        b"INFO" => Ok(Some((Op::Info(rest), size))),
        _ => Err(wrong(line)),
    }
}

/// `SUBJECT SID [REPLY] [HEADERS] TOTAL`, then headers, payload and an end of line.
fn message<'a>(
    line: &[u8],
    fields: &'a [u8],
    body: &'a [u8],
    size: usize,
    has_headers: bool,
) -> Result<Option<(Op<'a>, usize)>, String> {
    let mut found: [&[u8]; 5] = [&[]; 5];
    let mut count = 0;
    for field in fields.split(|byte| *byte == b' ').filter(|field| !field.is_empty()) {
        *found.get_mut(count).ok_or_else(|| wrong(line))? = field;
        count += 1;
    }
    let sizes = if has_headers { 2 } else { 1 };
    if count < 2 + sizes || count > 3 + sizes {
        return Err(wrong(line));
    }
    let number = |text: &[u8]| decimal(text).ok_or_else(|| wrong(line));
    let total = number(found[count - 1])? as usize;
    let header_size = if has_headers { number(found[count - 2])? as usize } else { 0 };
    if header_size > total {
        return Err(wrong(line));
    }
    if body.len() < total + 2 {
        return Ok(None);
    }
    if &body[total..total + 2] != b"\r\n" {
        return Err(wrong(line));
    }
    let reply: &[u8] = if count == 3 + sizes { found[2] } else { &[] };
    let (headers, payload) = body[..total].split_at(header_size);
    Ok(Some((Op::Message(Message { subject: found[0], reply, headers, payload }), size + total + 2)))
}

fn wrong(line: &[u8]) -> String {
    format!("the NATS server sent {:?}", String::from_utf8_lossy(line))
}

/// A number in decimal digits.
pub fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || text.len() > 19 {
        return None;
    }
    text.iter().try_fold(0u64, |number, byte| byte.is_ascii_digit().then(|| number * 10 + u64::from(byte - b'0')))
}

/// The last token of a subject, as a number.
pub fn last_number(subject: &[u8]) -> Option<u64> {
    decimal(subject.rsplit(|byte| *byte == b'.').next()?)
}

/// The number behind `"name":` in a flat JSON document.
pub fn json_number(text: &[u8], name: &[u8]) -> Option<u64> {
    let begin = text.windows(name.len()).position(|part| part == name)? + name.len();
    let digits = text[begin..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    decimal(&text[begin..begin + digits])
}

/// Appends a number in decimal digits.
pub fn push_decimal(out: &mut Vec<u8>, number: u64) {
    let mut digits = [0; 20];
    let mut begin = digits.len();
    let mut rest = number;
    loop {
        begin -= 1;
        digits[begin] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[begin..]);
}

/// Appends the line of a publish; payload and `\r\n` are for the caller to add.
pub fn push_publish(out: &mut Vec<u8>, subject: &[u8], reply: &[u8], payload_size: usize) {
    out.extend_from_slice(b"PUB ");
    out.extend_from_slice(subject);
    if !reply.is_empty() {
        out.push(b' ');
        out.extend_from_slice(reply);
    }
    out.push(b' ');
    push_decimal(out, payload_size as u64);
    out.extend_from_slice(b"\r\n");
}

/// As [`push_publish`], with a header block.
pub fn push_publish_headers(out: &mut Vec<u8>, subject: &[u8], reply: &[u8], headers: &[u8], payload_size: usize) {
    out.extend_from_slice(b"HPUB ");
    out.extend_from_slice(subject);
    if !reply.is_empty() {
        out.push(b' ');
        out.extend_from_slice(reply);
    }
    out.push(b' ');
    push_decimal(out, headers.len() as u64);
    out.push(b' ');
    push_decimal(out, (headers.len() + payload_size) as u64);
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(headers);
}

/// Most bytes of a WebSocket frame's head as a client sends it.
pub const FRAME_HEAD_SIZE_MAX: usize = 14;

/// The head of one binary frame of a client. The mask is zero, so that the payload goes as it is:
/// it protects proxies from browsers, and there are neither here.
pub fn frame_head(payload_size: usize) -> ([u8; FRAME_HEAD_SIZE_MAX], usize) {
    let mut head = [0; FRAME_HEAD_SIZE_MAX];
    head[0] = 0x82;
    let size = match payload_size {
        0..126 => {
            head[1] = 0x80 | payload_size as u8;
            2
        }
        126..65_536 => {
            head[1] = 0x80 | 126;
            head[2..4].copy_from_slice(&(payload_size as u16).to_be_bytes());
            4
        }
        _ => {
            head[1] = 0x80 | 127;
            head[2..10].copy_from_slice(&(payload_size as u64).to_be_bytes());
            10
        }
    };
    (head, size + 4)
}

/// Takes the frames of a server apart; they may be cut anywhere.
#[derive(Debug, Default)]
pub struct Unframer {
    head: Vec<u8>,
    /// Bytes of the present frame that are still to come, and whether they are data.
    rest: u64,
    is_data: bool,
}

impl Unframer {
    /// Appends the data in `bytes` to `out`.
    ///
    /// # Errors
    /// The server closes, masks or compresses.
    pub fn push(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) -> Result<(), String> {
        while !bytes.is_empty() {
            if self.rest > 0 {
                let size = (self.rest.min(bytes.len() as u64)) as usize;
                if self.is_data {
                    out.extend_from_slice(&bytes[..size]);
                }
                self.rest -= size as u64;
                bytes = &bytes[size..];
                continue;
            }
            self.head.push(bytes[0]);
            bytes = &bytes[1..];
            if let Some(rest) = frame_size(&self.head)? {
                self.is_data = self.head[0] & 0x0f <= 2;
                self.rest = rest;
                self.head.clear();
            }
        }
        Ok(())
    }
}

/// The payload's size when the head is complete.
fn frame_size(head: &[u8]) -> Result<Option<u64>, String> {
    let [first, second, ..] = head else { return Ok(None) };
    if first & 0x70 != 0 || second & 0x80 != 0 {
        return Err("the NATS server sent a WebSocket frame that is compressed or masked".into());
    }
    if first & 0x0f == 8 {
        return Err("the NATS server closed the WebSocket".into());
    }
    Ok(match second & 0x7f {
        126 => head.get(2..4).map(|size| u64::from(size[0]) << 8 | u64::from(size[1])),
        127 => head.get(2..10).map(|size| size.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))),
        size => Some(u64::from(size)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(mut bytes: &[u8]) -> Vec<String> {
        let mut out = Vec::new();
        while let Some((op, size)) = parse(bytes).unwrap() {
            out.push(format!("{op:?}"));
            bytes = &bytes[size..];
        }
        assert!(bytes.is_empty(), "{} bytes are left", bytes.len());
        out
    }

    /// What nats-server 2.15.1 sent to a client that published, with and without a batch, pulled
    /// what it had published, wrote where nobody listens, and then wrote nonsense.
    const RECORDED: &[u8] = b"INFO {\"server_id\":\"NBSR\",\"version\":\"2.15.1\",\"headers\":true} \r\nPONG\r\n\
        MSG _INBOX.a.7 1 26\r\n{\"stream\":\"bench\",\"seq\":1}\r\n\
        MSG _INBOX.a.u.10.fail.1.0.$FI 1 32\r\n{\"type\":\"ack\",\"seq\":0,\"msgs\":10}\r\n\
        MSG _INBOX.a.u.10.fail.2.2.$FI 1 48\r\n{\"stream\":\"bench\",\"seq\":3,\"batch\":\"u\",\"count\":2}\r\n\
        MSG bench 1 $JS.ACK.bench.c.1.1.1.1795418004878659605.2 4\r\nxxxx\r\n\
        MSG bench 1 $JS.ACK.bench.c.1.2.2.1795418004879779966.1 2\r\nhi\r\n\
        HMSG _INBOX.a.n 1 38 38\r\nNATS/1.0 503\r\nNats-Subject: nobody\r\n\r\n\r\n\
        -ERR 'Unknown Protocol Operation'\r\n";

    #[test]
    fn what_a_server_sends_is_understood_wherever_it_is_cut() {
        let ops = all(RECORDED);
        assert_eq!(ops.len(), 9, "{ops:#?}");
        for cut in 0..RECORDED.len() {
            let mut bytes = &RECORDED[..cut];
            let mut whole = Vec::new();
            while let Some((op, size)) = parse(bytes).unwrap() {
                whole.push(format!("{op:?}"));
                bytes = &bytes[size..];
            }
            assert_eq!(whole[..], ops[..whole.len()], "cut at {cut}");
        }
    }

    #[test]
    fn an_acknowledgement_tells_its_message_and_its_place() {
        let line = b"MSG _INBOX.a.7 1 29\r\n{\"stream\":\"bench\",\"seq\":1043}\r\n";
        let Some((Op::Message(ack), size)) = parse(line).unwrap() else { panic!("no message") };
        assert_eq!(size, line.len());
        assert_eq!(last_number(ack.subject), Some(7));
        assert_eq!(json_number(ack.payload, b"\"seq\":"), Some(1043));
        assert_eq!(json_number(ack.payload, b"\"msgs\":"), None);
    }

    #[test]
    fn reply_and_headers_are_told_apart() {
        let line = b"HMSG s 1 r 12 15\r\nNATS/1.0\r\n\r\nabc\r\n";
        let Some((Op::Message(message), _)) = parse(line).unwrap() else { panic!("no message") };
        assert_eq!(
            (message.reply, message.headers, message.payload),
            (&b"r"[..], &b"NATS/1.0\r\n\r\n"[..], &b"abc"[..])
        );
    }

    #[test]
    fn what_is_no_nats_is_refused() {
        for bytes in [
            &b"HTTP/1.1 400 Bad Request\r\n"[..],
            b"MSG a 1\r\n",
            b"MSG a 1 x\r\n",
            b"MSG a 1 2\r\nabcd",
            b"HMSG a 1 9 3\r\nabc\r\n",
        ] {
            assert!(parse(bytes).unwrap_err().starts_with("the NATS server sent"), "{}", bytes.escape_ascii());
        }
        assert!(parse(&[b'x'; LINE_SIZE_MAX + 1]).is_err());
    }

    #[test]
    fn publishes_are_written_as_the_protocol_has_them() {
        let mut out = Vec::new();
        push_publish(&mut out, b"s", b"", 0);
        push_publish(&mut out, b"s", b"_INBOX.a.18446744073709551615", 1024);
        push_publish_headers(&mut out, b"s", b"", b"NATS/1.0\r\n\r\n", 5);
        let expected = "PUB s 0\r\nPUB s _INBOX.a.18446744073709551615 1024\r\nHPUB s 12 17\r\nNATS/1.0\r\n\r\n";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
        let mut number = Vec::new();
        push_decimal(&mut number, u64::MAX);
        assert_eq!(number, u64::MAX.to_string().into_bytes());
    }

    #[test]
    fn websocket_frames_come_together_again() {
        let mut stream = vec![0x82, 3, b'a', b'b', b'c', 0x89, 1, b'!', 0x82, 126, 1, 0];
        stream.extend_from_slice(&[b'x'; 256]);
        stream.extend_from_slice(&[0x82, 127, 0, 0, 0, 0, 0, 0, 0, 1, b'y']);
        for step in [1, 2, 7, stream.len()] {
            let (mut unframer, mut out) = (Unframer::default(), Vec::new());
            for part in stream.chunks(step) {
                unframer.push(part, &mut out).unwrap();
            }
            assert_eq!((out.len(), &out[..3], out[259]), (260, &b"abc"[..], b'y'), "steps of {step}");
        }
        assert!(Unframer::default().push(&[0x88, 0], &mut Vec::new()).unwrap_err().contains("closed"));
        assert!(Unframer::default().push(&[0xc2, 0], &mut Vec::new()).unwrap_err().contains("compressed"));
    }

    #[test]
    fn a_frame_head_has_the_size_that_it_needs() {
        for (size, head_size, second) in
            [(125, 6, 0x80 | 125), (126, 8, 0x80 | 126), (65_535, 8, 0x80 | 126), (65_536, 14, 0x80 | 127)]
        {
            let (head, found) = frame_head(size);
            assert_eq!((found, head[0], head[1]), (head_size, 0x82, second));
        }
    }
}
