import ControlAPI
import Testing

@Suite struct ControlMethodsTests {
  private let methods = ControlMethods(
    [
      ControlMethod(
        "echo", "Gives its parameter back.",
        parameters: [
          ControlParameter("text", "string", required: true, "What to give back."),
          ControlParameter("count", "integer", required: false, "Ignored."),
        ], result: ["type": "string"]
      ) { parameters throws(ControlFault) in parameters["text"] ?? .null }
    ], version: "1")

  private func answer(_ text: String) -> JSONValue? { methods.answer(Array(text.utf8), subscribe: { _ in .null }) }

  private func error(_ text: String) -> (code: Int64?, field: String?) {
    let fault = answer(text)?["error"]
    return (fault?["code"]?.integerValue, fault?["data"]?["field"]?.stringValue)
  }

  @Test func requestIsAnsweredWithItsID() {
    let reply = answer(#"{"jsonrpc":"2.0","id":"x","method":"echo","params":{"text":"hi"}}"#)
    #expect(reply?["id"] == "x")
    #expect(reply?["result"] == "hi")
  }

  @Test func notificationHasNoAnswer() {
    #expect(answer(#"{"jsonrpc":"2.0","method":"echo","params":{"text":"hi"}}"#) == nil)
    #expect(answer(#"{"jsonrpc":"2.0","method":"nothing"}"#) == nil)
  }

  @Test func batchIsAnsweredAsABatch() {
    let reply = answer(
      #"[{"jsonrpc":"2.0","id":1,"method":"echo","params":{"text":"a"}},{"jsonrpc":"2.0","method":"echo"},3]"#)
    #expect(reply?.arrayValue?.count == 2)
  }

  @Test func everyFaultNamesItsField() {
    #expect(error("{") == (-32700, "message"))
    #expect(error("") == (-32600, "message"))
    #expect(error("[]") == (-32600, "message"))
    #expect(error("7") == (-32600, "message"))
    #expect(error(#"{"id":1,"method":"echo"}"#) == (-32600, "jsonrpc"))
    #expect(error(#"{"jsonrpc":"2.0","id":1}"#) == (-32600, "method"))
    #expect(error(#"{"jsonrpc":"2.0","id":[],"method":"echo"}"#) == (-32600, "id"))
    #expect(error(#"{"jsonrpc":"2.0","id":1,"method":"nothing"}"#) == (-32601, "method"))
    #expect(error(#"{"jsonrpc":"2.0","id":1,"method":"echo","params":[1]}"#) == (-32602, "params"))
    #expect(error(#"{"jsonrpc":"2.0","id":1,"method":"echo"}"#) == (-32602, "params.text"))
    #expect(error(#"{"jsonrpc":"2.0","id":1,"method":"echo","params":{"text":1}}"#) == (-32602, "params.text"))
    #expect(error(#"{"jsonrpc":"2.0","id":1,"method":"echo","params":{"text":"","no":1}}"#) == (-32602, "params.no"))
    #expect(error(String(repeating: "[", count: 5000)) == (-32700, "message"))
  }

  @Test func discoverDescribesEveryMethod() {
    let reply = answer(#"{"jsonrpc":"2.0","id":1,"method":"rpc.discover"}"#)?["result"]
    #expect(reply?["openrpc"] == "1.2.6")
    let echo = reply?["methods"]?.arrayValue?.first
    #expect(echo?["name"] == "echo")
    #expect(echo?["params"]?.arrayValue?.first?["required"] == true)
    #expect(echo?["result"]?["schema"]?["type"] == "string")
  }
}
