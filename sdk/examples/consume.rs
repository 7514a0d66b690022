//! Prints the events of a topic up to its end: `consume SERVERS TOPIC`, with the token in
//! `ARQON_TOKEN`.

use std::{env, error::Error};

use arqon_sdk::{Client, ConsumerOptions, Options};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let [_, servers, topic] = env::args().collect::<Vec<_>>().try_into().map_err(|_| "usage: consume SERVERS TOPIC")?;
    let client = Client::connect(Options::new([servers], env::var("ARQON_TOKEN")?)).await?;
    let options = ConsumerOptions { stop_at_end: true, ..Default::default() };
    let mut consumer = client.consumer(&topic, options).await?;
    while let Some(event) = consumer.next().await? {
        println!("{}@{} {}", event.partition, event.offset, String::from_utf8_lossy(&event.payload));
    }
    Ok(())
}
