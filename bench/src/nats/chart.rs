//! Bar charts as SVG, readable on light and on dark ground.

use std::fmt::Write;

/// Height of a bar and of the gap between groups, in units of the drawing.
const BAR: f64 = 18.0;
const GAP: f64 = 18.0;
/// Where bars begin, and the length of the longest.
const LEFT: f64 = 210.0;
const LENGTH: f64 = 430.0;
/// Width of the drawing.
const WIDTH: f64 = 760.0;
/// Room for the title.
const TOP: f64 = 44.0;

/// One bar.
pub struct Bar {
    /// Beside the bar.
    pub label: String,
    /// Its length.
    pub value: f64,
    /// Behind the bar.
    pub text: String,
    /// Whether it is this bus's.
    pub is_own: bool,
}

/// Bars that belong together.
pub struct Group {
    /// Above the bars.
    pub title: String,
    /// From top to bottom.
    pub bars: Vec<Bar>,
}

/// A drawing of all groups, with one scale for each group.
pub fn svg(title: &str, groups: &[Group]) -> String {
    let bars: usize = groups.iter().map(|group| group.bars.len()).sum();
    let height = TOP + bars as f64 * (BAR + 4.0) + groups.len() as f64 * (GAP + 20.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" \
         aria-label=\"{title}\">\n<title>{title}</title>\n<style>\n\
         text {{ font: 13px system-ui, sans-serif; fill: #1f2328; }}\n\
         .title {{ font-size: 16px; font-weight: 600; }} .group {{ font-weight: 600; }}\n\
         .own {{ fill: #0969da; }} .other {{ fill: #8c959f; }}\n\
         @media (prefers-color-scheme: dark) {{ text {{ fill: #e6edf3; }} .own {{ fill: #4493f8; }} \
         .other {{ fill: #6e7681; }} }}\n</style>\n<text class=\"title\" x=\"8\" y=\"24\">{title}</text>\n",
        title = escaped(title),
    );
    let mut y = TOP;
    for group in groups {
        let longest = group.bars.iter().map(|bar| bar.value).fold(f64::MIN_POSITIVE, f64::max);
        y += 16.0;
        // Writing to a string cannot fail.
        let _ = writeln!(out, "<text class=\"group\" x=\"8\" y=\"{y:.0}\">{}</text>", escaped(&group.title));
        y += 6.0;
        for bar in &group.bars {
            let class = if bar.is_own { "own" } else { "other" };
            let length = (bar.value / longest * LENGTH).max(1.0);
            let (label, text) = (escaped(&bar.label), escaped(&bar.text));
            let (base, behind) = (y + 13.5, LEFT + length + 6.0);
            let _ = writeln!(
                out,
                "<text x=\"{:.0}\" y=\"{base:.1}\" text-anchor=\"end\">{label}</text>\
                 <rect class=\"{class}\" x=\"{LEFT}\" y=\"{y:.1}\" width=\"{length:.1}\" height=\"{BAR}\" rx=\"2\"/>\
                 <text x=\"{behind:.1}\" y=\"{base:.1}\">{text}</text>",
                LEFT - 8.0,
            );
            y += BAR + 4.0;
        }
        y += GAP;
    }
    out.push_str("</svg>\n");
    out
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_as_long_as_their_values_and_text_is_escaped() {
        let bar = |value, is_own| Bar { label: "a<b".into(), value, text: format!("{value}"), is_own };
        let group = Group { title: "x & y".into(), bars: vec![bar(100.0, true), bar(25.0, false)] };
        let drawing = svg("t", &[group]);
        assert!(drawing.contains("class=\"own\"") && drawing.contains("width=\"430.0\""), "{drawing}");
        assert!(drawing.contains("class=\"other\"") && drawing.contains("width=\"107.5\""), "{drawing}");
        assert!(drawing.contains("a&lt;b") && drawing.contains("x &amp; y") && !drawing.contains("a<b"));
        assert!(drawing.contains("prefers-color-scheme: dark"));
    }
}
