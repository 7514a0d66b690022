//! What a run asks of the admin port of a node.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::Cluster;

/// Time for one answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(2);
/// Bytes of an answer that are read, at most.
const ANSWER_SIZE_MAX: u64 = 16 << 20;
/// The metric that names the program.
const BUILD: &str = "arqon_build_info{";

impl Cluster {
    /// The sum of a metric over its labels on a node; `None` when the node does not answer.
    pub async fn metric(&self, number: u64, name: &str) -> Option<f64> {
        let node = &self.nodes[self.index(number).ok()?];
        let text = get(&node.admin, "/metrics").await?;
        Some(text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| value_of(line, name)).sum())
    }

    /// Seconds since 1970 on the clock of a node, as its admin port tells.
    pub async fn time_of(&self, number: u64) -> Option<u64> {
        let node = &self.nodes[self.index(number).ok()?];
        let text = get(&node.admin, "/readyz").await?;
        let date = text.lines().find_map(|line| line.strip_prefix("date: "))?;
        httpdate(date)
    }

    /// The version of the program that a node runs, as its metrics name it; `None` when the node does not answer.
    /// Programs before version 2 of the peer protocol name none, which is the empty text here.
    pub async fn version_of(&self, number: u64) -> Option<String> {
        let node = &self.nodes[self.index(number).ok()?];
        Some(version_in(&get(&node.admin, "/metrics").await?).to_owned())
    }

    /// Whether a node is ready now.
    pub async fn is_ready(&self, number: u64) -> bool {
        match self.index(number) {
            Ok(index) => is_ready(&self.nodes[index].admin).await,
            Err(_) => false,
        }
    }
}

/// Whether `GET /readyz` answers 200.
pub(super) async fn is_ready(admin: &str) -> bool {
    let answer = get(admin, "/readyz").await;
    answer.is_some_and(|answer| answer.split_whitespace().nth(1) == Some("200"))
}

/// The answer to a GET, headers and all; `None` when there is none in time.
async fn get(admin: &str, path: &str) -> Option<String> {
    let ask = async {
        let mut stream = TcpStream::connect(admin).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut bytes = Vec::new();
        stream.take(ANSWER_SIZE_MAX).read_to_end(&mut bytes).await?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&bytes).into_owned())
    };
    timeout(ANSWER_TIME_MAX, ask).await.ok()?.ok()
}

/// The version of the program that these metrics name.
fn version_in(metrics: &str) -> &str {
    let labels = metrics.lines().find_map(|line| line.strip_prefix(BUILD)).unwrap_or_default();
    let told = labels.split_once("program=\"").and_then(|(_, rest)| rest.split_once('"'));
    told.map_or("", |(version, _)| version)
}

/// The value of a line `NAME{..} VALUE` whose name ends with `name` or `name_total`.
fn value_of(line: &str, name: &str) -> Option<f64> {
    let (series, value) = line.rsplit_once(' ')?;
    let family = series.split('{').next()?.trim_end_matches("_total");
    if !family.ends_with(name) {
        return None;
    }
    value.parse().ok()
}

/// Seconds since 1970 of a date as HTTP writes it: `Sun, 06 Nov 1994 08:49:37 GMT`.
fn httpdate(date: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let mut fields = date.split([' ', ':']).skip(1);
    let day: i64 = fields.next()?.parse().ok()?;
    let month = fields.next()?;
    let month = MONTHS.iter().position(|name| *name == month)? as i64 + 1;
    let year: i64 = fields.next()?.parse().ok()?;
    let [hour, minute, second] = [(); 3].map(|()| fields.next().and_then(|field| field.parse::<i64>().ok()));
    // Days of the civil calendar, counted in years that begin in March.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 1 - 719_468;
    u64::try_from(days * 86_400 + hour? * 3600 + minute? * 60 + second?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_of_http_are_seconds() {
        assert_eq!(httpdate("Thu, 01 Jan 1970 00:00:01 GMT"), Some(1));
        assert_eq!(httpdate("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        assert_eq!(httpdate("Thu, 29 Feb 2024 12:00:00 GMT"), Some(1_709_208_000));
        assert_eq!(httpdate("yesterday"), None);
    }

    #[test]
    fn metrics_are_found_by_their_name_with_and_without_labels() {
        assert_eq!(value_of("arqon_log_damage_found_total{group=\"1\"} 3", "log_damage_found"), Some(3.0));
        assert_eq!(value_of("arqon_log_damage 2", "log_damage"), Some(2.0));
        assert_eq!(value_of("arqon_log_damage_found_total 2", "log_damage"), None);
    }

    #[test]
    fn metrics_name_the_program_or_do_not() {
        let metrics = "# TYPE arqon_build info\narqon_build_info{program=\"0.1.0-5f0c\",peer_protocol=\"x\"} 1\n";
        assert_eq!(version_in(metrics), "0.1.0-5f0c");
        assert_eq!(version_in("arqon_connections 3\n"), "");
    }

    #[tokio::test]
    async fn readiness_is_the_answer_200_and_nothing_else() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = tokio::spawn(async move {
            for status in ["503 Service Unavailable", "200 OK"] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = [0; 1024];
                assert!(stream.read(&mut request).await.unwrap() > 0);
                stream.write_all(format!("HTTP/1.1 {status}\r\n\r\n").as_bytes()).await.unwrap();
            }
        });
        assert!(!is_ready(&address).await);
        assert!(is_ready(&address).await);
        server.await.unwrap();
        assert!(!is_ready(&address).await);
    }
}
