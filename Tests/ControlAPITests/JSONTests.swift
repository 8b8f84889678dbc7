import ControlAPI
import Testing

@Suite struct JSONTests {
  private func parse(_ text: String) throws(JSONText.Fault) -> JSONValue { try JSONText.parse(Array(text.utf8)) }

  @Test func valuesSurviveTheRoundTrip() throws {
    let value: JSONValue = [
      "a": [1, 2, .number(1.5), true, .null], "b": ["c": "ä \"quoted\" \n line"], "n": .integer(.min), "e": .object([]),
    ]
    #expect(try parse(JSONText.text(value)) == value)
    #expect(!JSONText.text(value).contains("\n"))
  }

  @Test(arguments: ["{", "[1,", "{\"a\":}", "nul", "1 2", "{} x", "'a'", "[1,]"])
  func textThatIsNoJSONIsRefused(text: String) {
    #expect(throws: JSONText.Fault.self) { try parse(text) }
  }

  @Test func bytesThatAreNoUTF8AreRefused() {
    #expect(throws: JSONText.Fault.self) { try JSONText.parse([0x22, 0xff, 0xfe, 0x22]) }
  }

  @Test func nestingIsLimited() throws {
    let allowed = String(repeating: "[", count: 30) + String(repeating: "]", count: 30)
    #expect(throws: Never.self) { try parse(allowed) }
    let deep = String(repeating: "[", count: 100_000)
    #expect(throws: JSONText.Fault.tooDeep) { try parse(deep) }
  }

  @Test func framesComeOutWhereverTheStreamIsCut() {
    let stream = Array("one\n\ntwo\nthree".utf8)
    var whole = FrameReader()
    let expected = whole.append(stream)
    #expect(expected == [.message(Array("one".utf8)), .message([]), .message(Array("two".utf8))])
    var piecewise = FrameReader()
    #expect(stream.flatMap { piecewise.append([$0]) } == expected)
  }

  @Test func messageOverOneMebibyteIsReportedOnceAndSkipped() {
    var reader = FrameReader()
    let part = [UInt8](repeating: 0x61, count: 300_000)
    var items: [FrameReader.Item] = []
    for _ in 0..<8 { items += reader.append(part) }
    #expect(items == [.tooLong])
    #expect(reader.append(Array("\nnext\n".utf8)) == [.message(Array("next".utf8))])
  }
}
