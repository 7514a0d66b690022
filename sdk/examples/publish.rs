//! Publishes the lines of standard input: `publish SERVERS TOPIC`, with the token in `ARQON_TOKEN`.

use std::{env, error::Error, io};

use arqon_sdk::{Client, NewEvent, Options, ProducerOptions};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let [_, servers, topic] = env::args().collect::<Vec<_>>().try_into().map_err(|_| "usage: publish SERVERS TOPIC")?;
    let client = Client::connect(Options::new([servers], env::var("ARQON_TOKEN")?)).await?;
    let producer = client.producer(&topic, ProducerOptions::default()).await?;
    let mut deliveries = Vec::new();
    for line in io::stdin().lines() {
        deliveries.push(producer.send(NewEvent::new(line?)).await?);
    }
    for delivery in deliveries {
        let receipt = delivery.await?;
        println!("{}/{}@{}", receipt.topic, receipt.partition, receipt.offset);
    }
    Ok(())
}
