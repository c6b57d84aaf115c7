//! Question files as they are found: LLaVA conversation JSON, CSV, easy-VQA, plain JSON objects. In all but easy-VQA's a picture or a
//! question may be absent; the answer may not.

use csv::{ErrorKind, Position, ReaderBuilder, Trim};
use serde_json::Value;

use super::dataset::DataError;

/// The layouts of [`parse`], for error texts.
pub(super) const ACCEPTED: &str = r#"CSV (.csv) with the columns picture, question, answer; JSON (.json) as [{"picture": "1.png", "question": "...", "answer": "..."}, ...], picture or question left out where there is none; LLaVA's JSON [{"id": "1", "image": "1.png", "conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}, ...]; easy-VQA's JSON [["question", "answer", picture id], ...]"#;

/// What the picture of a sample may be called, the preferred name first.
const PICTURE_KEYS: [&str; 3] = ["picture", "image", "file"];

/// A sample as written, its picture not yet loaded. One of picture and question may be absent, never both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// File name of the picture, as written.
    pub picture: Option<String>,
    /// The question; empty if there is none.
    pub question: String,
    /// The answer.
    pub answer: String,
}

impl Entry {
    /// What a file says, absent parts as `None`; the error is what it lacks.
    fn new(picture: Option<String>, question: Option<String>, answer: Option<String>) -> Result<Self, &'static str> {
        if picture.is_none() && question.is_none() {
            return Err("picture and no question");
        }
        Ok(Self { picture, question: question.unwrap_or_default(), answer: answer.ok_or("answer")? })
    }
}

/// Read a question file in any accepted layout, chosen by extension and first element.
///
/// # Errors
/// [`DataError`]; an unknown layout is answered with a list of the known ones.
pub fn parse(file_name: &str, text: &str) -> Result<Vec<Entry>, DataError> {
    let name = file_name.to_ascii_lowercase();
    let unknown = || DataError::Layout { file: file_name.to_owned() };
    if name.ends_with(".csv") {
        return parse_csv(text);
    }
    if !name.ends_with(".json") {
        return Err(unknown());
    }
    let rows = json_list(file_name, text)?;
    match rows.first() {
        None => Err(DataError::Empty),
        Some(Value::Array(_)) => easy_vqa(&rows),
        Some(Value::Object(o)) if o.contains_key("conversations") => llava(&rows),
        Some(Value::Object(o)) if o.contains_key("question") || o.contains_key("answer") => objects(&rows),
        Some(_) => Err(unknown()),
    }
}

/// Read LLaVA's conversations; each pair of turns becomes an entry.
///
/// # Errors
/// [`DataError`] names the record.
pub fn parse_llava(json: &str) -> Result<Vec<Entry>, DataError> {
    llava(&json_list("the LLaVA JSON", json)?)
}

/// Read easy-VQA's `[[question, answer, id], ...]`; the picture is `ID.png`.
///
/// # Errors
/// [`DataError`] names the entry.
pub fn parse_easy_vqa(json: &str) -> Result<Vec<Entry>, DataError> {
    easy_vqa(&json_list("the easy-VQA JSON", json)?)
}

/// Read CSV; the first row names the columns picture (or image, file), question and answer, in any order and case. Picture or
/// question may be empty in a row, or have no column at all.
///
/// # Errors
/// [`DataError`] names the line.
pub fn parse_csv(csv: &str) -> Result<Vec<Entry>, DataError> {
    let text = without_bom(csv);
    if text.trim().is_empty() {
        return Err(DataError::Empty);
    }
    let mut reader = ReaderBuilder::new().trim(Trim::All).from_reader(text.as_bytes());
    let header = reader.headers().map_err(|e| csv_error(text, &e))?.clone();
    let column = |names: &[&str]| names.iter().find_map(|n| header.iter().position(|h| h.eq_ignore_ascii_case(n)));
    let absent = |missing: &'static str| {
        let found = header.iter().collect::<Vec<_>>().join(", ");
        DataError::Column { missing, found }
    };
    let (picture, question) = (column(&PICTURE_KEYS), column(&["question"]));
    if picture.is_none() && question.is_none() {
        return Err(absent(PICTURE_KEYS[0]));
    }
    let answer = column(&["answer"]).ok_or_else(|| absent("answer"))?;
    let mut entries = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|e| csv_error(text, &e))?;
        let field = |column: Option<usize>| {
            let value = column.and_then(|column| record.get(column)).unwrap_or_default();
            (!value.is_empty()).then(|| value.to_owned())
        };
        let entry = Entry::new(field(picture), field(question), field(Some(answer)));
        entries.push(entry.map_err(|what| {
            let place = format!("line {}", line_of(text, record.position()));
            DataError::Missing { place, what }
        })?);
    }
    Ok(entries)
}

/// Spreadsheets put a byte order mark first.
fn without_bom(text: &str) -> &str {
    text.trim_start_matches('\u{feff}')
}

fn json_list(file: &str, text: &str) -> Result<Vec<Value>, DataError> {
    match serde_json::from_str(without_bom(text)) {
        Ok(Value::Array(rows)) => Ok(rows),
        Ok(_) => Err(DataError::Layout { file: file.to_owned() }),
        Err(e) => Err(DataError::Json(e.to_string())),
    }
}

/// Trimmed text; numbers count as text.
fn text_of(value: &Value) -> Option<String> {
    let text = match value {
        Value::String(s) => s.trim().to_owned(),
        Value::Number(n) => n.to_string(),
        _ => String::new(),
    };
    (!text.is_empty()).then_some(text)
}

fn required(value: Option<String>, place: &str, what: &'static str) -> Result<String, DataError> {
    value.ok_or_else(|| DataError::Missing { place: place.to_owned(), what })
}

fn easy_vqa(rows: &[Value]) -> Result<Vec<Entry>, DataError> {
    let mut entries = Vec::with_capacity(rows.len());
    for (i, row) in rows.iter().enumerate() {
        let place = format!("entry {}", i + 1);
        let Some([question, answer, id]) = row.as_array().map(Vec::as_slice) else {
            return Err(DataError::Triple { place });
        };
        let id = required(text_of(id), &place, "picture id")?;
        entries.push(Entry {
            picture: Some(format!("{id}.png")),
            question: required(text_of(question), &place, "question")?,
            answer: required(text_of(answer), &place, "answer")?,
        });
    }
    Ok(entries)
}

fn objects(rows: &[Value]) -> Result<Vec<Entry>, DataError> {
    let mut entries = Vec::with_capacity(rows.len());
    for (i, row) in rows.iter().enumerate() {
        let picture = PICTURE_KEYS.iter().find_map(|key| text_of(&row[*key]));
        let entry = Entry::new(picture, text_of(&row["question"]), text_of(&row["answer"]));
        entries.push(entry.map_err(|what| DataError::Missing { place: format!("entry {}", i + 1), what })?);
    }
    Ok(entries)
}

fn llava(records: &[Value]) -> Result<Vec<Entry>, DataError> {
    let mut entries = Vec::new();
    for (i, value) in records.iter().enumerate() {
        let record = match text_of(&value["id"]) {
            Some(id) => format!("'{id}'"),
            None => format!("number {}", i + 1),
        };
        // LLaVA's text-only records have no 'image' at all (its scripts/convert_sqa_to_llava.py writes such).
        let picture = match &value["image"] {
            Value::Null => None,
            Value::String(name) if !name.trim().is_empty() => Some(name.trim().to_owned()),
            _ => return Err(DataError::NoImage { record }),
        };
        let turns = value["conversations"].as_array().map(Vec::as_slice).unwrap_or_default();
        if turns.is_empty() {
            return Err(DataError::Missing { place: format!("record {record}"), what: "conversations" });
        }
        let mut asked: Option<String> = None;
        for (t, turn) in turns.iter().enumerate() {
            let from = turn["from"].as_str().unwrap_or_default();
            let said = turn["value"].as_str().unwrap_or_default();
            match (from, asked.take()) {
                ("human", None) => {
                    let question = without_image_mark(said);
                    if picture.is_none() && said.contains(IMAGE_MARK) {
                        return Err(DataError::NoImage { record });
                    }
                    if picture.is_none() && question.is_empty() {
                        return Err(DataError::Missing { place: format!("record {record}"), what: "question" });
                    }
                    asked = Some(question);
                }
                ("gpt", Some(question)) if !said.trim().is_empty() => {
                    entries.push(Entry { picture: picture.clone(), question, answer: said.trim().to_owned() });
                }
                ("human" | "gpt", Some(question)) => return Err(DataError::Unanswered { record, question }),
                _ => {
                    return Err(DataError::Turn { record, turn: t + 1, from: from.to_owned() });
                }
            }
        }
        if let Some(question) = asked {
            return Err(DataError::Unanswered { record, question });
        }
    }
    Ok(entries)
}

/// Where LLaVA's conversations place the picture.
const IMAGE_MARK: &str = "<image>";

/// The prompt places the picture, so its mark and the newlines around it leave the question.
fn without_image_mark(question: &str) -> String {
    let parts = question.split(IMAGE_MARK).map(str::trim).filter(|part| !part.is_empty());
    parts.collect::<Vec<_>>().join(" ")
}

fn csv_error(text: &str, error: &csv::Error) -> DataError {
    match error.kind() {
        ErrorKind::UnequalLengths { pos, expected_len, len } => DataError::Fields {
            line: line_of(text, pos.as_ref()),
            expected: *expected_len as usize,
            found: *len as usize,
        },
        _ => DataError::Csv(error.to_string()),
    }
}

/// Line of a record, from 1. The reader's own count is off by one after CRLF, its byte offset is not.
fn line_of(text: &str, position: Option<&Position>) -> usize {
    let bytes = text.as_bytes();
    let mut start = position.map_or(0, |p| p.byte() as usize).min(bytes.len());
    while bytes.get(start).is_some_and(|b| matches!(b, b'\r' | b'\n')) {
        start += 1;
    }
    1 + bytes[..start].iter().filter(|b| **b == b'\n').count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(picture: &str, question: &str, answer: &str) -> Entry {
        let picture = (!picture.is_empty()).then(|| picture.to_owned());
        Entry { picture, question: question.into(), answer: answer.into() }
    }

    fn fault<T: std::fmt::Debug>(result: Result<T, DataError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn reads_llava_conversations() {
        let json = r#"[{"id": "a", "image": "1.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": " A cup. "},
            {"from": "human", "value": "Which colour?\n<image>"}, {"from": "gpt", "value": "Red"}]}]"#;
        let expected = vec![entry("1.png", "What is it?", "A cup."), entry("1.png", "Which colour?", "Red")];
        assert_eq!(parse_llava(json).unwrap(), expected);
        assert_eq!(parse("Data.JSON", json).unwrap(), expected);
    }

    #[test]
    fn llava_records_may_be_text_or_picture_alone() {
        let json = r#"[{"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
            {"id": "b", "image": null, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
            {"id": "c", "image": "1.png", "conversations":
                [{"from": "human", "value": "<image>\n"}, {"from": "gpt", "value": "Red"}]}]"#;
        assert_eq!(
            parse_llava(json).unwrap(),
            [entry("", "Hi", "Ho"), entry("", "Hi", "Ho"), entry("1.png", "", "Red")]
        );
    }

    #[test]
    fn llava_faults_name_the_record() {
        let one = |body: &str| fault(parse_llava(&format!("[{{\"id\": 7, {body}}}]")));
        let said = |value: &str| {
            format!(r#""conversations": [{{"from": "human", "value": "{value}"}}, {{"from": "gpt", "value": "Ho"}}]"#)
        };
        for lost in [said("<image>\\nHi"), said("<image>"), format!(r#""image": ["1.png"], {}"#, said("Hi"))] {
            let text = one(&lost);
            assert!(text.contains("'7'") && text.contains("'image'") && text.contains("text-only"), "{text}");
        }
        assert!(one(&said(" ")).contains("no question"));
        for turns in [
            r#"{"from": "human", "value": "<image>\nWhy?"}"#,
            r#"{"from": "human", "value": "Why?"}, {"from": "human", "value": "How?"}"#,
            r#"{"from": "human", "value": "Why?"}, {"from": "gpt", "value": " "}"#,
        ] {
            let text = one(&format!(r#""image": "1.png", "conversations": [{turns}]"#));
            assert!(text.contains("'7'") && text.contains("'Why?' has no answer") && text.contains("add"), "{text}");
        }
        let turn = one(r#""image": "1.png", "conversations": [{"from": "gpt", "value": "Red"}]"#);
        assert!(turn.contains("turn 1 is from 'gpt'"), "{turn}");
        let empty = one(r#""image": "1.png", "conversations": [{"from": "human", "value": "<image>\n"}]"#);
        assert!(empty.contains("has no answer"), "{empty}");
        assert!(one(r#""image": "1.png", "conversations": []"#).contains("no conversations"));
    }

    #[test]
    fn reads_csv_in_any_column_order() {
        let csv = "\u{feff}Answer,IMAGE, Question\r\nred,1.png,\"Which, then?\"\r\n\r\nno,2.png,Is it?\r\n";
        let expected = vec![entry("1.png", "Which, then?", "red"), entry("2.png", "Is it?", "no")];
        assert_eq!(parse("x.csv", csv).unwrap(), expected);
    }

    #[test]
    fn csv_rows_may_lack_picture_or_question() {
        let csv = "picture,question,answer\n1.png,Why?,so\n,Why?,so\n2.png,,so\n";
        let expected = vec![entry("1.png", "Why?", "so"), entry("", "Why?", "so"), entry("2.png", "", "so")];
        assert_eq!(parse_csv(csv).unwrap(), expected);
        assert_eq!(parse_csv("question,answer\nWhy?,so\n").unwrap(), [entry("", "Why?", "so")]);
        assert_eq!(parse_csv("file,answer\n1.png,so\n").unwrap(), [entry("1.png", "", "so")]);
        let text = fault(parse_csv("picture,question,answer\n1.png,Why?,so\n,,so\n"));
        assert!(text.contains("line 3 has no picture and no question"), "{text}");
    }

    #[test]
    fn csv_faults_name_the_line() {
        for newline in ["\n", "\r\n"] {
            let csv = |rows: &str| rows.replace('\n', newline);
            let text = fault(parse_csv(&csv("file,question,answer\n1.png,q,a\n\n2.png,Why?, \n")));
            assert!(text.contains("line 4 has no answer"), "{text}");
            let text = fault(parse_csv(&csv("file,question,answer\n1.png,\"a\nb\",c\n,,a\n")));
            assert!(text.contains("line 4 has no picture and no question"), "{text}");
            let text = fault(parse_csv(&csv("file,question,answer\n1.png,q,a\n1.png,q,a,b\n")));
            assert!(text.contains("line 3 has 4 columns") && text.contains("quotes"), "{text}");
        }
        let text = fault(parse_csv("picture;question;answer\n"));
        assert!(text.contains("no column 'picture'") && text.contains("picture;question;answer"), "{text}");
        assert!(fault(parse_csv("picture,question\n")).contains("'answer'"));
        assert_eq!(parse_csv(" \n"), Err(DataError::Empty));
    }

    #[test]
    fn reads_easy_vqa_and_objects() {
        let triples = r#"[["what is it?", "circle", 0], ["and this?", "no", "17"]]"#;
        let expected = vec![entry("0.png", "what is it?", "circle"), entry("17.png", "and this?", "no")];
        assert_eq!(parse_easy_vqa(triples).unwrap(), expected);
        assert_eq!(parse("questions.json", triples).unwrap(), expected);
        let objects = r#"[{"picture": "0.png", "question": "what is it?", "answer": "circle"},
            {"image": "17.png", "question": "and this?", "answer": "no"}]"#;
        assert_eq!(parse("questions.json", objects).unwrap(), expected);
        assert!(fault(parse_easy_vqa(r#"[["q", "a", 0], ["q", "a"]]"#)).contains("entry 2"));
        assert!(fault(parse_easy_vqa(r#"[["q", "", 0]]"#)).contains("entry 1 has no answer"));
        let objects = r#"[{"question": "q", "answer": "a"}, {"file": "0.png", "answer": 3}]"#;
        assert_eq!(parse("a.json", objects).unwrap(), [entry("", "q", "a"), entry("0.png", "", "3")]);
        let neither = fault(parse("a.json", r#"[{"question": " ", "answer": "a"}]"#));
        assert!(neither.contains("entry 1 has no picture and no question"), "{neither}");
        assert!(fault(parse("a.json", r#"[{"question": "q", "picture": "0.png"}]"#)).contains("entry 1 has no answer"));
    }

    #[test]
    fn unknown_layouts_are_answered_with_the_known_ones() {
        for (name, text) in [("a.txt", "[]"), ("a.json", "{}"), ("a.json", "[1]"), ("a.json", r#"[{"a": 1}]"#)] {
            let text = fault(parse(name, text));
            assert!(text.contains(name) && text.contains("conversations") && text.contains("CSV"), "{text}");
        }
        assert!(fault(parse("a.json", "[")).contains("JSON cannot be read"));
        assert_eq!(parse("a.json", "[]"), Err(DataError::Empty));
    }
}
