//! Both ends of a peer connection prove that they hold the cluster secret, and agree on a version.
//!
//! ```text
//!   dialler                                                       acceptor
//!   hello(versions, cluster, node, target, nonce a, bulk)  ──►
//!                 ◄── challenge(versions, nonce b, HMAC("accept" | facts))
//!   proof(HMAC("dial" | facts)) ──►
//!                 ◄── ready
//! ```
//! Both use the highest version that both speak. The facts are cluster, both nodes and both nonces, so that a proof
//! fits one connection only; from version 2 on also the versions of both ends and what the connection is for.
//!
//! Somebody in between who cuts ranges out, so that both ends fall back to a version that proves less, is found out:
//!
//! | cut | what each end goes by | found out by |
//! |---|---|---|
//! | the dialler's range | it 2, the acceptor 1 | the proof, which is of another version |
//! | the acceptor's range | it 2, the dialler 1 | the same |
//! | both | version 1 | a mark: an acceptor that speaks 2 and is asked for 1 leaves one in its nonce |
//!
//! The mark in the nonce is that of the server random in RFC 8446, 4.1.3.

use std::io;

use arqon_proto::{NodeId, PEER_VERSIONS, VersionRange, wire, wire::peer_frame::Body as Message};
use rand::Rng;
use ring::hmac;
use tokio::io::{AsyncRead, AsyncWrite};

use super::framed::{Body, FrameReader, FrameWriter};

/// The last version whose proofs do not hold the versions of the ends.
const UNBOUND_VERSION: u32 = 1;
const NONCE_SIZE: usize = 32;
/// How the nonce of an acceptor ends that speaks more than [`UNBOUND_VERSION`] and was asked for no more than that.
const TALKED_DOWN: [u8; 8] = *b"ARQNDOWN";

/// What every node of the cluster knows and nobody else.
#[derive(Clone)]
pub(crate) struct Secret {
    key: hmac::Key,
    cluster: String,
    versions: VersionRange,
}

/// Who dialled, once it is proven.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dialler {
    pub node: NodeId,
    /// The version that is used.
    pub version: u32,
}

struct Facts<'a> {
    version: u32,
    dialler: u64,
    acceptor: u64,
    dial_nonce: &'a [u8],
    accept_nonce: &'a [u8],
    dial_versions: VersionRange,
    accept_versions: VersionRange,
    bulk: bool,
}

impl Secret {
    pub(crate) fn new(cluster: &str, secret: &[u8]) -> Self {
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
        Self { key, cluster: cluster.to_owned(), versions: PEER_VERSIONS }
    }

    fn message(&self, side: &str, facts: &Facts<'_>) -> Vec<u8> {
        let mut out = Vec::with_capacity(128);
        for part in [side.as_bytes(), self.cluster.as_bytes(), facts.dial_nonce, facts.accept_nonce] {
            out.extend_from_slice(&(part.len() as u64).to_le_bytes());
            out.extend_from_slice(part);
        }
        out.extend_from_slice(&facts.dialler.to_le_bytes());
        out.extend_from_slice(&facts.acceptor.to_le_bytes());
        if facts.version > UNBOUND_VERSION {
            for versions in [facts.dial_versions, facts.accept_versions] {
                out.extend_from_slice(&versions.min().to_le_bytes());
                out.extend_from_slice(&versions.max().to_le_bytes());
            }
            out.push(facts.bulk.into());
        }
        out
    }

    fn prove(&self, side: &str, facts: &Facts<'_>) -> Vec<u8> {
        hmac::sign(&self.key, &self.message(side, facts)).as_ref().to_vec()
    }

    fn check(&self, side: &str, facts: &Facts<'_>, proof: &[u8]) -> io::Result<()> {
        hmac::verify(&self.key, &self.message(side, facts), proof)
            .map_err(|_| refuse(format!("the {side} side does not hold this cluster's secret")))
    }

    /// The version that both ends use.
    fn agree(&self, node: NodeId, other: NodeId, theirs: VersionRange) -> io::Result<u32> {
        let ours = self.versions;
        ours.common(theirs).ok_or_else(|| {
            refuse(format!("no common peer protocol: node {node} speaks {ours}, node {other} speaks {theirs}"))
        })
    }

    /// The dialling side, on a fresh connection: the version that is used.
    pub(crate) async fn dial<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
        &self,
        reader: &mut FrameReader<R>,
        writer: &mut FrameWriter<W>,
        node: NodeId,
        target: NodeId,
        bulk: bool,
    ) -> io::Result<u32> {
        let mut nonce = [0u8; NONCE_SIZE];
        rand::rng().fill_bytes(&mut nonce);
        let hello = wire::PeerHello {
            version: self.versions.min(),
            version_max: self.versions.max(),
            cluster: self.cluster.clone(),
            node: node.0,
            target_node: target.0,
            nonce: nonce.to_vec().into(),
            bulk,
        };
        send(writer, Message::Hello(hello)).await?;
        let Message::Challenge(challenge) = receive(reader).await? else {
            return Err(refuse("expected a challenge".into()));
        };
        let theirs = VersionRange::told(challenge.version_min, challenge.version_max);
        let version = self.agree(node, target, theirs)?;
        let facts = Facts {
            version,
            dialler: node.0,
            acceptor: target.0,
            dial_nonce: &nonce,
            accept_nonce: &challenge.nonce,
            dial_versions: self.versions,
            accept_versions: theirs,
            bulk,
        };
        self.check("accept", &facts, &challenge.proof)?;
        if self.is_down(version) && challenge.nonce.ends_with(&TALKED_DOWN) {
            return Err(refuse(format!("somebody in between changed the versions that node {node} told")));
        }
        send(writer, Message::Proof(wire::PeerProof { proof: self.prove("dial", &facts).into() })).await?;
        match receive(reader).await? {
            Message::Ready(_) => Ok(version),
            _ => Err(refuse("expected to be let in".into())),
        }
    }

    /// Whether the versions of the other end are not proven and this end could do better.
    fn is_down(&self, version: u32) -> bool {
        version == UNBOUND_VERSION && self.versions.max() > UNBOUND_VERSION
    }

    /// The accepting side. A refusal is sent to the dialler before it is returned.
    pub(crate) async fn accept<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
        &self,
        reader: &mut FrameReader<R>,
        writer: &mut FrameWriter<W>,
        node: NodeId,
    ) -> io::Result<Dialler> {
        let result = self.accept_inner(reader, writer, node).await;
        if let Err(error) = &result
            && error.kind() == io::ErrorKind::PermissionDenied
        {
            let refusal = wire::PeerError { code: wire::peer_error::Code::Refused.into(), message: error.to_string() };
            // The dialler may be gone already; the refusal stands either way.
            send(writer, Message::Error(refusal)).await.ok();
        }
        result
    }

    async fn accept_inner<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
        &self,
        reader: &mut FrameReader<R>,
        writer: &mut FrameWriter<W>,
        node: NodeId,
    ) -> io::Result<Dialler> {
        let Message::Hello(hello) = receive(reader).await? else {
            return Err(refuse("expected hello".into()));
        };
        if hello.cluster != self.cluster {
            return Err(refuse(format!("this is cluster {:?}, not {:?}", self.cluster, hello.cluster)));
        }
        if hello.target_node != node.0 {
            return Err(refuse(format!("this is node {node}, not {}", hello.target_node)));
        }
        if hello.nonce.len() != NONCE_SIZE {
            return Err(refuse("nonce must have 32 bytes".into()));
        }
        let theirs = VersionRange::told(hello.version, hello.version_max);
        let version = self.agree(node, NodeId(hello.node), theirs)?;
        let mut nonce = [0u8; NONCE_SIZE];
        rand::rng().fill_bytes(&mut nonce);
        if self.is_down(version) {
            nonce[NONCE_SIZE - TALKED_DOWN.len()..].copy_from_slice(&TALKED_DOWN);
        }
        let facts = Facts {
            version,
            dialler: hello.node,
            acceptor: node.0,
            dial_nonce: &hello.nonce,
            accept_nonce: &nonce,
            dial_versions: theirs,
            accept_versions: self.versions,
            bulk: hello.bulk,
        };
        let challenge = wire::PeerChallenge {
            nonce: nonce.to_vec().into(),
            proof: self.prove("accept", &facts).into(),
            version_min: self.versions.min(),
            version_max: self.versions.max(),
        };
        send(writer, Message::Challenge(challenge)).await?;
        let Message::Proof(proof) = receive(reader).await? else {
            return Err(refuse("expected a proof".into()));
        };
        self.check("dial", &facts, &proof.proof)?;
        send(writer, Message::Ready(wire::PeerReady {})).await?;
        Ok(Dialler { node: NodeId(hello.node), version })
    }
}

fn refuse(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, reason)
}

async fn send<W: AsyncWrite + Unpin>(writer: &mut FrameWriter<W>, message: Message) -> io::Result<()> {
    writer.push(&wire::PeerFrame { body: Some(message), ..Default::default() }, &Body::EMPTY)?;
    writer.flush().await
}

async fn receive<R: AsyncRead + Unpin>(reader: &mut FrameReader<R>) -> io::Result<Message> {
    let (frame, _) = reader.next().await?.ok_or(io::ErrorKind::UnexpectedEof)?;
    match frame.body {
        Some(Message::Error(error)) => Err(refuse(error.message)),
        Some(message) => Ok(message),
        None => Err(refuse("empty frame".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a dialler and an acceptor make of each other.
    struct Shaken {
        dialled: io::Result<u32>,
        accepted: io::Result<Dialler>,
    }

    fn speaking(secret: &[u8], versions: VersionRange) -> Secret {
        Secret { versions, ..Secret::new("lab", secret) }
    }

    /// Node 1 dials node `target` and node 2 accepts; `between` may change what goes by.
    async fn shake_through(
        dialler: &Secret,
        acceptor: &Secret,
        target: u64,
        between: impl Fn(Message) -> Message,
    ) -> Shaken {
        let (a, from_a) = tokio::io::duplex(64 << 10);
        let (b, from_b) = tokio::io::duplex(64 << 10);
        let pair = |stream| {
            let (read, write) = tokio::io::split(stream);
            (FrameReader::new(read), FrameWriter::new(write))
        };
        let ((mut a_read, mut a_write), (mut b_read, mut b_write)) = (pair(a), pair(b));
        let ((mut left_read, mut left_write), (mut right_read, mut right_write)) = (pair(from_a), pair(from_b));
        // It owns its ends, so that one that hangs up is heard of at the other.
        let relay = async move {
            loop {
                let (message, writer) = tokio::select! {
                    frame = left_read.next() => (frame, &mut right_write),
                    frame = right_read.next() => (frame, &mut left_write),
                };
                let Ok(Some((frame, _))) = message else { return };
                let Some(message) = frame.body else { return };
                if send(writer, between(message)).await.is_err() {
                    return;
                }
            }
        };
        let (dialled, accepted, ()) = tokio::join!(
            async {
                let result = dialler.dial(&mut a_read, &mut a_write, NodeId(1), NodeId(target), true).await;
                // An end that is done hangs up.
                drop((a_read, a_write));
                result
            },
            async {
                let result = acceptor.accept(&mut b_read, &mut b_write, NodeId(2)).await;
                drop((b_read, b_write));
                result
            },
            relay,
        );
        Shaken { dialled, accepted }
    }

    async fn shake(dialler: &Secret, acceptor: &Secret, target: u64) -> Shaken {
        shake_through(dialler, acceptor, target, |message| message).await
    }

    #[tokio::test]
    async fn only_holders_of_the_secret_are_let_in() {
        let ours = Secret::new("lab", &[7; 32]);
        let shaken = shake(&ours, &ours, 2).await;
        assert_eq!(shaken.dialled.unwrap(), PEER_VERSIONS.max());
        let dialler = shaken.accepted.unwrap();
        assert_eq!((dialler.node, dialler.version), (NodeId(1), PEER_VERSIONS.max()));

        let shaken = shake(&Secret::new("lab", &[8; 32]), &ours, 2).await;
        assert!(shaken.dialled.unwrap_err().to_string().contains("secret"));
        assert!(shaken.accepted.is_err());
    }

    #[tokio::test]
    async fn another_cluster_and_another_node_are_named() {
        let ours = Secret::new("lab", &[7; 32]);
        let refused = shake(&Secret::new("other", &[7; 32]), &ours, 2).await.dialled.unwrap_err();
        assert!(refused.to_string().contains("this is cluster \"lab\", not \"other\""));
        let refused = shake(&ours, &ours, 3).await.dialled.unwrap_err();
        assert!(refused.to_string().contains("this is node 2, not 3"));
    }

    #[tokio::test]
    async fn the_highest_common_version_is_used_whoever_dials() {
        let cases = [((1, 2), (1, 1), 1), ((1, 1), (1, 2), 1), ((1, 3), (2, 4), 3), ((2, 2), (1, 2), 2)];
        for (dialler, acceptor, version) in cases {
            let secret = |(min, max)| speaking(&[7; 32], VersionRange::new(min, max));
            let shaken = shake(&secret(dialler), &secret(acceptor), 2).await;
            assert_eq!(shaken.dialled.unwrap(), version, "{dialler:?} dials {acceptor:?}");
            assert_eq!(shaken.accepted.unwrap().version, version, "{dialler:?} dials {acceptor:?}");
        }
    }

    #[tokio::test]
    async fn without_a_common_version_both_ends_name_both_ranges() {
        let (old, new) = (VersionRange::new(1, 2), VersionRange::new(3, 4));
        let shaken = shake(&speaking(&[7; 32], new), &speaking(&[7; 32], old), 2).await;
        let (dialled, accepted) = (shaken.dialled.unwrap_err(), shaken.accepted.unwrap_err());
        for refused in [dialled, accepted] {
            let text = "node 2 speaks versions 1 to 2, node 1 speaks versions 3 to 4";
            assert!(refused.to_string().contains(text), "{refused}");
        }
    }

    // Somebody between two nodes wants them to use version 1, whose proofs say nothing of versions.
    #[tokio::test]
    async fn nobody_in_between_can_talk_two_nodes_down() {
        let both = Secret::new("lab", &[7; 32]);
        let cut_hello = |message| match message {
            Message::Hello(hello) => Message::Hello(wire::PeerHello { version_max: 0, ..hello }),
            other => other,
        };
        let cut_challenge = |message| match message {
            Message::Challenge(challenge) => {
                Message::Challenge(wire::PeerChallenge { version_min: 0, version_max: 0, ..challenge })
            }
            other => other,
        };
        for cut in [&cut_hello as &dyn Fn(Message) -> Message, &cut_challenge] {
            let changed = shake_through(&both, &both, 2, cut).await;
            assert!(changed.dialled.is_err() && changed.accepted.is_err());
        }
        let changed = shake_through(&both, &both, 2, |message| cut_challenge(cut_hello(message))).await;
        assert!(changed.dialled.unwrap_err().to_string().contains("somebody in between"));
        assert!(changed.accepted.is_err());
    }

    // What a connection is for decides how much it may send at once.
    #[tokio::test]
    async fn what_the_connection_is_for_is_proven_too() {
        let both = Secret::new("lab", &[7; 32]);
        let turn = |message| match message {
            Message::Hello(hello) => Message::Hello(wire::PeerHello { bulk: !hello.bulk, ..hello }),
            other => other,
        };
        let changed = shake_through(&both, &both, 2, turn).await;
        assert!(changed.dialled.is_err() && changed.accepted.is_err());
    }

    /// The proof of version 1, written down once more: programs of the first version are out there.
    fn proof_of_version_1(side: &str, dial_nonce: &[u8], accept_nonce: &[u8]) -> Vec<u8> {
        let mut facts = Vec::new();
        for part in [side.as_bytes(), b"lab", dial_nonce, accept_nonce] {
            facts.extend((part.len() as u64).to_le_bytes());
            facts.extend(part);
        }
        facts.extend([1u64, 2].map(u64::to_le_bytes).concat());
        hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &[7; 32]), &facts).as_ref().to_vec()
    }

    fn ends() -> (Ends, Ends) {
        let (one, other) = tokio::io::duplex(64 << 10);
        let pair = |stream| {
            let (read, write) = tokio::io::split(stream);
            (FrameReader::new(read), FrameWriter::new(write))
        };
        (pair(one), pair(other))
    }

    type Stream = tokio::io::DuplexStream;
    type Ends = (FrameReader<tokio::io::ReadHalf<Stream>>, FrameWriter<tokio::io::WriteHalf<Stream>>);

    #[tokio::test]
    async fn a_program_of_version_1_dials_this_one() {
        let ((mut read, mut write), (mut accept_read, mut accept_write)) = ends();
        let ours = Secret::new("lab", &[7; 32]);
        let dial = async {
            let nonce = vec![5; NONCE_SIZE];
            let hello = wire::PeerHello {
                version: 1,
                cluster: "lab".into(),
                node: 1,
                target_node: 2,
                nonce: nonce.clone().into(),
                ..Default::default()
            };
            send(&mut write, Message::Hello(hello)).await.unwrap();
            let Message::Challenge(challenge) = receive(&mut read).await.unwrap() else { panic!("no challenge") };
            assert_eq!(challenge.proof, proof_of_version_1("accept", &nonce, &challenge.nonce));
            let proof = proof_of_version_1("dial", &nonce, &challenge.nonce).into();
            send(&mut write, Message::Proof(wire::PeerProof { proof })).await.unwrap();
            assert!(matches!(receive(&mut read).await.unwrap(), Message::Ready(_)));
        };
        let (accepted, ()) = tokio::join!(ours.accept(&mut accept_read, &mut accept_write, NodeId(2)), dial);
        assert_eq!(accepted.unwrap().version, 1);
    }

    #[tokio::test]
    async fn this_program_dials_one_of_version_1() {
        let ((mut read, mut write), (mut dial_read, mut dial_write)) = ends();
        let ours = Secret::new("lab", &[7; 32]);
        let accept = async {
            let Message::Hello(hello) = receive(&mut read).await.unwrap() else { panic!("no hello") };
            assert_eq!(hello.version, 1, "a program of version 1 refuses every other number");
            let nonce = vec![6; NONCE_SIZE];
            let proof = proof_of_version_1("accept", &hello.nonce, &nonce).into();
            let challenge = wire::PeerChallenge { nonce: nonce.clone().into(), proof, ..Default::default() };
            send(&mut write, Message::Challenge(challenge)).await.unwrap();
            let Message::Proof(proof) = receive(&mut read).await.unwrap() else { panic!("no proof") };
            assert_eq!(proof.proof, proof_of_version_1("dial", &hello.nonce, &nonce));
            send(&mut write, Message::Ready(wire::PeerReady {})).await.unwrap();
        };
        let dial = ours.dial(&mut dial_read, &mut dial_write, NodeId(1), NodeId(2), false);
        let (dialled, ()) = tokio::join!(dial, accept);
        assert_eq!(dialled.unwrap(), 1);
    }
}
