//! Both ends of a peer connection prove that they hold the cluster secret.
//!
//! ```text
//!   dialler                                   acceptor
//!   hello(version, cluster, node, target, nonce a, bulk)  ──►
//!                 ◄── challenge(nonce b, HMAC("accept" | facts))
//!   proof(HMAC("dial" | facts)) ──►
//!                 ◄── ready
//! ```
//! The facts are cluster, both nodes and both nonces, so that a proof fits one connection only.

use std::io;

use arqon_proto::{NodeId, wire, wire::peer_frame::Body as Message};
use rand::Rng;
use ring::hmac;
use tokio::io::{AsyncRead, AsyncWrite};

use super::framed::{Body, FrameReader, FrameWriter};

const PROTOCOL_VERSION: u32 = 1;
const NONCE_SIZE: usize = 32;

/// What every node of the cluster knows and nobody else.
#[derive(Clone)]
pub(crate) struct Secret {
    key: hmac::Key,
    cluster: String,
}

/// Who dialled, once it is proven.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dialler {
    pub node: NodeId,
}

struct Facts<'a> {
    dialler: u64,
    acceptor: u64,
    dial_nonce: &'a [u8],
    accept_nonce: &'a [u8],
}

impl Secret {
    pub(crate) fn new(cluster: &str, secret: &[u8]) -> Self {
        Self { key: hmac::Key::new(hmac::HMAC_SHA256, secret), cluster: cluster.to_owned() }
    }

    fn message(&self, side: &str, facts: &Facts<'_>) -> Vec<u8> {
        let mut out = Vec::with_capacity(128);
        for part in [side.as_bytes(), self.cluster.as_bytes(), facts.dial_nonce, facts.accept_nonce] {
            out.extend_from_slice(&(part.len() as u64).to_le_bytes());
            out.extend_from_slice(part);
        }
        out.extend_from_slice(&facts.dialler.to_le_bytes());
        out.extend_from_slice(&facts.acceptor.to_le_bytes());
        out
    }

    fn prove(&self, side: &str, facts: &Facts<'_>) -> Vec<u8> {
        hmac::sign(&self.key, &self.message(side, facts)).as_ref().to_vec()
    }

    fn check(&self, side: &str, facts: &Facts<'_>, proof: &[u8]) -> io::Result<()> {
        hmac::verify(&self.key, &self.message(side, facts), proof)
            .map_err(|_| refuse(format!("the {side} side does not hold this cluster's secret")))
    }

    /// The dialling side, on a fresh connection.
    pub(crate) async fn dial<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
        &self,
        reader: &mut FrameReader<R>,
        writer: &mut FrameWriter<W>,
        node: NodeId,
        target: NodeId,
        bulk: bool,
    ) -> io::Result<()> {
        let mut nonce = [0u8; NONCE_SIZE];
        rand::rng().fill_bytes(&mut nonce);
        let hello = wire::PeerHello {
            version: PROTOCOL_VERSION,
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
        let facts = Facts { dialler: node.0, acceptor: target.0, dial_nonce: &nonce, accept_nonce: &challenge.nonce };
        self.check("accept", &facts, &challenge.proof)?;
        send(writer, Message::Proof(wire::PeerProof { proof: self.prove("dial", &facts).into() })).await?;
        match receive(reader).await? {
            Message::Ready(_) => Ok(()),
            _ => Err(refuse("expected to be let in".into())),
        }
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
        if hello.version != PROTOCOL_VERSION {
            return Err(refuse(format!("peer protocol version {} is not known here", hello.version)));
        }
        if hello.cluster != self.cluster {
            return Err(refuse(format!("this is cluster {:?}, not {:?}", self.cluster, hello.cluster)));
        }
        if hello.target_node != node.0 {
            return Err(refuse(format!("this is node {node}, not {}", hello.target_node)));
        }
        if hello.nonce.len() != NONCE_SIZE {
            return Err(refuse("nonce must have 32 bytes".into()));
        }
        let mut nonce = [0u8; NONCE_SIZE];
        rand::rng().fill_bytes(&mut nonce);
        let facts = Facts { dialler: hello.node, acceptor: node.0, dial_nonce: &hello.nonce, accept_nonce: &nonce };
        let challenge =
            wire::PeerChallenge { nonce: nonce.to_vec().into(), proof: self.prove("accept", &facts).into() };
        send(writer, Message::Challenge(challenge)).await?;
        let Message::Proof(proof) = receive(reader).await? else {
            return Err(refuse("expected a proof".into()));
        };
        self.check("dial", &facts, &proof.proof)?;
        send(writer, Message::Ready(wire::PeerReady {})).await?;
        Ok(Dialler { node: NodeId(hello.node) })
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

    async fn shake(dialler: &Secret, acceptor: &Secret, target: u64) -> (io::Result<()>, io::Result<Dialler>) {
        let (a, b) = tokio::io::duplex(64 << 10);
        let (a_read, a_write) = tokio::io::split(a);
        let (b_read, b_write) = tokio::io::split(b);
        let (mut a_read, mut a_write) = (FrameReader::new(a_read), FrameWriter::new(a_write));
        let (mut b_read, mut b_write) = (FrameReader::new(b_read), FrameWriter::new(b_write));
        tokio::join!(
            async {
                let result = dialler.dial(&mut a_read, &mut a_write, NodeId(1), NodeId(target), false).await;
                // A dialler that gives up hangs up.
                drop((a_read, a_write));
                result
            },
            acceptor.accept(&mut b_read, &mut b_write, NodeId(2)),
        )
    }

    #[tokio::test]
    async fn only_holders_of_the_secret_are_let_in() {
        let ours = Secret::new("lab", &[7; 32]);
        let (dialled, accepted) = shake(&ours, &ours, 2).await;
        dialled.unwrap();
        assert_eq!(accepted.unwrap().node, NodeId(1));

        let theirs = Secret::new("lab", &[8; 32]);
        let (dialled, accepted) = shake(&theirs, &ours, 2).await;
        assert!(dialled.unwrap_err().to_string().contains("secret"));
        assert!(accepted.is_err());
    }

    #[tokio::test]
    async fn another_cluster_and_another_node_are_named() {
        let ours = Secret::new("lab", &[7; 32]);
        let (dialled, _) = shake(&Secret::new("other", &[7; 32]), &ours, 2).await;
        assert!(dialled.unwrap_err().to_string().contains("this is cluster \"lab\", not \"other\""));
        let (dialled, _) = shake(&ours, &ours, 3).await;
        assert!(dialled.unwrap_err().to_string().contains("this is node 2, not 3"));
    }
}
